// Package vm boots Debian's own kernels under an emulated processor: what a container cannot show,
// since its kernel is the host's, with the modules, the clock and the limits of that one. Modules
// are absent here and come, the machine loses its power, its clock steps, the table of connections
// is full, and serial port 1 is a port.
//
// One VM is of the architecture arm64, whose disk is made by programs of it under test/foreign.sh.
//
// Its tests, under the build tag vm, need root, qemu-system-x86_64 (qemu-system-aarch64),
// debootstrap and, once, Debian's package servers; `make vm` and `make soak` run them. KVM is not
// used: the machine that runs the tests is a guest itself, as a rule. Images are kept outside of
// the clone (test/kept.sh); each VM writes on an overlay of its own, which goes with it.
//
// What was seen is written to testdata, and docs/kernels.md is made of it (package seen).
package vm
