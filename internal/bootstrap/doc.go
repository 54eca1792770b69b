// Package bootstrap turns a plain VM into a mesh node and back: it reads the gce-service-proxy
// attribute, installs Envoy, writes Envoy's configuration, the folders, users and units, and starts
// them. It runs as root in a unit of its own, service-proxy-bootstrap.service, apart from the
// daemon, which has no rights to any of this.
//
// Every step looks first and then changes only what differs, so a run on a finished VM changes
// nothing, and a run after a power cut at any moment ends where an undisturbed one does. Progress
// goes to a file (package progress); the daemon publishes it.
//
// It does not touch the kernel's rules, nor does it decide what is intercepted: that is agent. The
// next package in the flow is systemd, whose units it installs.
package bootstrap
