// Command stage is what deploy/packages/build.sh needs Go for. It lays down, beneath a folder, the
// files of a package that the program itself has: the units and what goes with them, as they are in
// a package, and the manual. It must be linked as the program of a package is (internal/layout).
// And it prints which glibc an Envoy needs.
//
//	go run -ldflags '-X …/internal/layout.of=packages' ./deploy/packages/stage DIR
//	go run ./deploy/packages/stage --libc FILE
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 2:
		err = stage(os.Args[1])
	case len(os.Args) == 3 && os.Args[1] == "--libc":
		libc := system.NeededLibc(os.Args[2])
		if libc == "" {
			err = fmt.Errorf("%q is no program that needs glibc", os.Args[2])
		}
		fmt.Fprintln(os.Stdout, libc)
	default:
		fmt.Fprintln(os.Stderr, "usage: stage DIR | stage --libc FILE")
		os.Exit(64)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stage:", err)
		os.Exit(1)
	}
}

func stage(dir string) error {
	if !layout.Here.Packaged {
		return errors.New("not linked for a package")
	}
	if _, err := systemd.Install(dir); err != nil {
		return err
	}
	pages, err := filepath.Glob("docs/man/*.8")
	if err != nil {
		return err
	}
	man := filepath.Join(dir, layout.Here.ShareDir, "man/man8")
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			return err
		}
		err = os.WriteFile(filepath.Join(man, filepath.Base(page)),
			[]byte(layout.Here.Text(string(text))), 0o644)
		if err != nil {
			return err
		}
	}
	return nil
}
