// Package system looks at the machine that a VM is, and judges whether the agent can be installed
// and run there: the distribution, systemd, mounts, SELinux, cgroups, packages, iptables, the
// kernel's modules and the C library that Envoy needs.
//
// Look is thin and changes nothing: it reads files and mount flags, and has programs say their
// version. It asks the kernel for no table and no match, since the kernel makes or loads what it is
// asked for. Judge is pure. Package bootstrap is the next in the flow: its first step refuses by
// these rows, and `bootstrap --check` prints them.
package system
