# Boots a node: run by node.py with `unshare --mount --net`, so that all that is made here, mounts and
# links and namespaces, lives in namespaces of its own and dies with the processes in them. The network
# namespace that this starts in is "the world"; the node gets another one, joined to it by a veth pair.
# In the environment: HOME_DIR (see homes.py), IMAGE, CGROUP, NAME, WORLD_ADDRESS, NODE_ADDRESS.
set -eu

echo $$ >"$CGROUP/cgroup.procs"

mount -t overlay "vmnode-lab-$NAME" \
    -o "lowerdir=$IMAGE,upperdir=$HOME_DIR/upper,workdir=$HOME_DIR/work" "$HOME_DIR/root"

# systemd-nspawn keeps files in /run/systemd/nspawn that it would leave behind when it is killed.
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd

unshare --net="$HOME_DIR/uplink" true
ip link set lo up
ip link add world0 type veth peer name uplink0
ip link set uplink0 netns "$HOME_DIR/uplink"
ip address add "$WORLD_ADDRESS/24" dev world0
ip link set world0 up
nsenter --net="$HOME_DIR/uplink" sh -euc '
    ip link set lo up
    ip address add "$NODE_ADDRESS/24" dev uplink0
    ip link set uplink0 up
    ip route add default via "$WORLD_ADDRESS"'

# Not --network-interface: it asks udev, which knows nothing of links outside the host's own namespace.
# With a namespace made beforehand, only the last variable makes /proc/sys/net writable (ip_forward).
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_LOCK=0 SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
exec systemd-nspawn --boot --directory="$HOME_DIR/root" --machine="$NAME" --register=no --keep-unit \
    --network-namespace-path="$HOME_DIR/uplink" --private-users=no --capability=all \
    --resolv-conf=off --timezone=off --link-journal=no --console=pipe
