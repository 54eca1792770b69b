package main

import (
	"bytes"
	"strings"
	"testing"
	"testing/fstest"
)

func file(body string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(body)} }

// TestWrite: texts of the folders that are linked in and of those above, each once.
func TestWrite(t *testing.T) {
	one := source{name: "example.org/one", version: "v1.0.0", folders: []string{"a/b", "."}, root: fstest.MapFS{
		"LICENSE": file("Apache\r\n"), "NOTICE.txt": file("One's notice"), "license.go": file("package one"),
		"a/b/COPYING": file("of b"), "c/LICENSE": file("of c, which is not linked in"), "README": file("x"),
	}}
	two := source{name: "example.org/two", version: "v2.0.0", folders: []string{"."}, root: fstest.MapFS{
		"LICENSE.md": file("Apache\n")}}
	var out bytes.Buffer
	if err := write(&out, []source{one, two}); err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("-", 80)
	want := head
	for _, part := range [][2]string{
		{"example.org/one v1.0.0: LICENSE\nexample.org/two v2.0.0: LICENSE.md", "Apache"},
		{"example.org/one v1.0.0: NOTICE.txt", "One's notice"},
		{"example.org/one v1.0.0: a/b/COPYING", "of b"},
	} {
		want += "\n" + line + "\n" + part[0] + "\n" + line + "\n\n" + part[1] + "\n"
	}
	if out.String() != want {
		t.Errorf("have:\n%s\nwant:\n%s", out.String(), want)
	}
}

// TestWithoutLicence: a module without one is named, and nothing is written.
func TestWithoutLicence(t *testing.T) {
	var out bytes.Buffer
	err := write(&out, []source{
		{name: "example.org/good", version: "v1.0.0", folders: []string{"."},
			root: fstest.MapFS{"LICENSE": file("x")}},
		{name: "example.org/bad", version: "v1.0.1", folders: []string{"a"},
			root: fstest.MapFS{"NOTICE": file("x"), "a/LICENSE.go": file("x"), "b/LICENSE": file("x")}},
	})
	if err == nil || !strings.Contains(err.Error(), "example.org/bad v1.0.1 has no licence") ||
		strings.Contains(err.Error(), "good") || out.Len() > 0 {
		t.Errorf("error %v, written %q", err, out.String())
	}
}

// TestLinked: what is linked into the program on either architecture, with its licences.
func TestLinked(t *testing.T) {
	t.Chdir("../..")
	all, err := linked(t.Context(), "amd64", "arm64")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, s := range all {
		names[s.name] = true
	}
	if !names["github.com/spf13/cobra"] || names["github.com/google/go-cmp"] || len(all) < 20 {
		t.Errorf("linked in: %v", names)
	}
	var out bytes.Buffer
	if err := run(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"github.com/spf13/cobra v", "Go go1.", "Redistribution and use in source"} {
		if !strings.Contains(out.String(), part) {
			t.Errorf("no %q in what is printed", part)
		}
	}
}
