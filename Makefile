# The developer's front door. `make help` lists every target.
# `make test` and `make demo` work as the first command on a fresh Debian or Ubuntu machine, as root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# What the tests and the demo need beside Python: to build wheels, to make nodes, to look at the kernel from outside.
PACKAGES := python3-venv python3-dev gcc pkg-config libvirt-dev libsystemd-dev e2fsprogs \
            mmdebstrap debian-archive-keyring systemd-container nftables iptables ipset iproute2 tcpdump dnsmasq-base \
            qemu-utils bindfs fuse3 gawk mawk acl

DESTDIR ?=
LIB := /usr/lib/vmnode
LIBEXEC := /usr/libexec/condor

.PHONY: help packages venv demo pool-shell test test-unit test-kernel test-old-python test-libvirt test-pool \
        lint bench soak install clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

packages: ## install the system packages that tests and demo need (apt)
	@missing=(); for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	if [ $${#missing[@]} -gt 0 ]; then \
	  [ "$$(id -u)" = 0 ] || { echo "these packages are missing: $${missing[*]}; run this as root" >&2; exit 77; }; \
	  echo "installing $${missing[*]}"; \
	  apt-get -qq update; \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi

venv: $(VENV)/.complete ## a virtual environment with vmnode's commands in .venv/bin

$(VENV)/.complete: pyproject.toml
	@$(MAKE) --no-print-directory packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip -q install --upgrade pip
	$(BIN)/pip -q install --editable . --group dev
	@touch $@

demo: venv ## boot a one-node HTCondor pool, break its network, watch the attribute, repair it (root)
	$(BIN)/python -m tests.lab demo

pool-shell: venv ## a shell in a running node of the lab; boots one if there is none (root)
	$(BIN)/python -m tests.lab shell

test: lint test-unit test-kernel test-old-python ## everything (root)
	# Both wait for daemons most of their time.
	$(MAKE) --no-print-directory -j 2 --output-sync=target test-libvirt test-pool

lint: venv ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-unit: venv ## what needs nothing
	$(PYTEST) -n 2 tests/unit

test-kernel: venv ## namespaces, bridges, firewalls (root)
	$(PYTEST) -n 2 tests/kernel

test-old-python: venv ## the unit and kernel tests on Python 3.9 with pyroute2 0.5.14, as EL9 has them (root)
	$(BIN)/python -m tests.lab old-python

test-libvirt: venv ## a real libvirtd: the fault matrix (root)
	$(PYTEST) -n 2 --dist loadgroup tests/libvirt

test-pool: venv ## a real HTCondor node, with 23.9 and with 25.14 (root)
	$(PYTEST) tests/pool

bench: venv ## the figures of docs/benchmarks.md (root)
	$(BIN)/python -m tests.bench

soak: venv ## long runs: 1,000 healthy checks, 200 crashes of the daemon among jobs (root)
	$(PYTEST) --soak --verbose tests/libvirt/test_soak.py tests/kernel/test_accounting.py -k "soak or crashes_at_random"

install: ## copy everything to $(DESTDIR)/, as the package has it
	install -d $(DESTDIR)$(LIB) $(DESTDIR)/usr/bin $(DESTDIR)/usr/sbin $(DESTDIR)$(LIBEXEC) $(DESTDIR)/etc/vmnode/conf.d
	find vmnode -name '*.py' -exec install -D -m 0644 {} $(DESTDIR)$(LIB)/{} \;
	printf '#!/usr/bin/python3 -I\nimport sys\n\nsys.path.insert(0, "$(LIB)")\nfrom vmnode.commands.admin import main\n\nsys.exit(main())\n' > $(DESTDIR)/usr/bin/vmnode
	printf '#!/usr/bin/python3 -I\nimport sys\n\nsys.path.insert(0, "$(LIB)")\nfrom vmnode.commands.daemon import main\n\nsys.exit(main())\n' > $(DESTDIR)/usr/sbin/vmnoded
	printf '#!/usr/bin/python3 -IS\nimport sys\n\nsys.path.insert(0, "$(LIB)")\nfrom vmnode.commands.startd_cron import main\n\nsys.exit(main())\n' > $(DESTDIR)$(LIBEXEC)/vmnode-startd-cron
	printf '#!/usr/bin/python3 -IS\nimport os\nimport sys\n\nsys.path.insert(0, "$(LIB)")\nfrom vmnode.commands.nfs_plugin import main\n\nstatus = main()\nsys.stdout.flush()\nos._exit(status)  # tidying up would take longer than the policy\n' > $(DESTDIR)$(LIBEXEC)/vm-nfs-plugin
	install -D -m 0755 condor-config/vmnode-starter.py $(DESTDIR)$(LIBEXEC)/vmnode-starter
	install -D -m 0755 condor-config/vmnode-domain-xml.sh $(DESTDIR)$(LIBEXEC)/vmnode-domain-xml
	install -D -m 0755 condor-config/vmnode-vm-gahp.sh $(DESTDIR)$(LIBEXEC)/vmnode-vm-gahp
	chmod 0755 $(DESTDIR)/usr/bin/vmnode $(DESTDIR)/usr/sbin/vmnoded $(addprefix $(DESTDIR)$(LIBEXEC)/,vmnode-startd-cron vm-nfs-plugin vmnode-domain-xml)
	install -D -m 0644 systemd/vmnode.service $(DESTDIR)/usr/lib/systemd/system/vmnode.service
	install -D -m 0644 network-config/firewalld-vmnode.xml $(DESTDIR)/usr/lib/firewalld/zones/vmnode.xml
	install -D -m 0644 network-config/90-vmnode-networkmanager.conf $(DESTDIR)/usr/lib/NetworkManager/conf.d/90-vmnode.conf
	install -D -m 0644 network-config/10-vmnode.network $(DESTDIR)/usr/lib/systemd/network/10-vmnode.network
	install -D -m 0644 condor-config/50-vmnode.conf $(DESTDIR)/usr/share/condor/config.d/50-vmnode.conf
	install -D -m 0644 condor-config/99-vmnode-policy.conf $(DESTDIR)/usr/share/doc/vmnode/99-vmnode-policy.conf
	install -D -m 0644 condor-config/99-vmnode-accounting.conf $(DESTDIR)/usr/share/doc/vmnode/99-vmnode-accounting.conf
	test -e $(DESTDIR)/etc/vmnode/vmnode.toml || install -m 0644 vmnode.toml $(DESTDIR)/etc/vmnode/vmnode.toml

clean: ## remove what was made here
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
