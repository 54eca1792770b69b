package iptables

import (
	"errors"
	"testing"
	"testing/fstest"
)

// Where nothing can be loaded, it is said that only a reboot helps; where that is not known,
// nothing is.
func TestNoModules(t *testing.T) {
	const release = "6.1.0-50-cloud-amd64"
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	modules := fstest.MapFS{"proc/modules": file(""),
		"proc/sys/kernel/modules_disabled":        file("0\n"),
		"lib/modules/" + release + "/modules.dep": file("")}
	with := func(name, text string) fstest.MapFS {
		all := fstest.MapFS{name: file(text)}
		for n, f := range modules {
			if _, there := all[n]; !there {
				all[n] = f
			}
		}
		return all
	}
	for _, test := range []struct {
		name    string
		root    fstest.MapFS
		release string
		want    string
	}{
		{"they can be", modules, release, ""},
		{"a kernel without modules", fstest.MapFS{}, release, ""},
		{"loading is off", with("proc/sys/kernel/modules_disabled", "1\n"), release,
			"no module can be loaded before a reboot: kernel.modules_disabled is set"},
		{"another kernel is installed", modules, "6.1.0-49-cloud-amd64",
			"no module can be loaded before a reboot: /lib/modules/6.1.0-49-cloud-amd64 is not there"},
		{"its name is not known", modules, "", ""},
	} {
		err := noModules(test.root, test.release)
		if have := ""; err != nil {
			have = err.Error()
			if have != test.want || !errors.Is(err, ErrNoModules) {
				t.Errorf("%s: %q, want %q", test.name, have, test.want)
			}
		} else if test.want != "" {
			t.Errorf("%s: nothing, want %q", test.name, test.want)
		}
	}
}
