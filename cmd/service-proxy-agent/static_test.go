//go:build lab

package main

import (
	"debug/elf"
	"path/filepath"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestStatic: what `make build` and `make binaries` made needs nothing of the image it runs on: no
// loader and no shared library.
func TestStatic(t *testing.T) {
	built, err := mesh.Binary()
	if err != nil {
		t.Fatal(err)
	}
	for name, machine := range map[string]elf.Machine{
		"service-proxy-agent":       0, // this machine's
		"service-proxy-agent-amd64": elf.EM_X86_64,
		"service-proxy-agent-arm64": elf.EM_AARCH64,
	} {
		f, err := elf.Open(filepath.Join(filepath.Dir(built), name))
		if err != nil {
			t.Errorf("%v: run `make build binaries`", err)
			continue
		}
		defer f.Close()
		if machine != 0 && f.Machine != machine {
			t.Errorf("%s: built for %v", name, f.Machine)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s: not static: it has a program header %v", name, p.Type)
			}
		}
	}
}
