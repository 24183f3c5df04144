"""What needs root: namespaces, bridges, firewalls, and a real dnsmasq."""
