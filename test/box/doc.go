// Package box boots a whole VM, as far as software sees one: a Debian root filesystem under
// systemd-nspawn with real systemd, and the network of test/lab in which test/platform stands for
// Compute Engine and test/controlplane for Traffic Director. Its tests, under the build tag box,
// install the product as OS Config and startup scripts do and override nothing of it: no flag, no
// environment, no address.
//
// It needs root, debootstrap, systemd-nspawn and, once, Debian's package servers; `make test`
// and `make soak` run it. The root filesystems are kept outside of the clone (test/kept.sh), and
// each test writes on an overlay of its own.
package box
