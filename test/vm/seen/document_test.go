package seen

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/kernels.md")

const head = `# Kernels: what was run and seen

` + "`make vm`" + ` boots Debian's own kernels (5.10, 6.1, 6.12) under QEMU's emulation of a processor,
with that release's systemd and iptables, and installs the archive as gcloud's recipe does.
` + "`make test`" + ` has the kernel of the machine that runs it, on which nothing can be missing. What it
does on each kernel, with each backend:

- bootstrap to FINISHED, told on serial port 1, which is the emulated machine's ttyS0; a service
  from inside and a serving port from outside, by IPv4 and IPv6, go through Envoy;
- rules are removed, chains flushed: repaired;
- Envoy is restarted hot: the next epoch serves under the same supervisor;
- the machine is reset while services come and go and somebody takes rules away: after the boot the
  rules are those of the last push, each jump is there once, no file of the state is half written;
- modules are absent and come back, loading is forbidden, the folder of the modules is gone (below);
- the clock steps three hours forth and six back: it is found, the heartbeat goes on, rules are
  repaired, the budget of guest attributes is kept;
- the table of connections is full: it is found, told on serial port 1, and over when there is room.

The VM of architecture arm64 (` + "`make soak GROUP=arm64`" + `, an emulated Neoverse N1) has the first three
of these, on nft, and ` + "`doctor`" + `, with the Envoy for arm64 that the archive brings.

This page is made by ` + "`go test ./test/vm/seen -update`" + ` of what those runs wrote to
` + "`test/vm/testdata`" + `; a run with other findings, exit codes or remedies fails. A kernel, a
backend or a module that has no row here has not been seen yet; as root and within two hours
` + "`go test -tags vm -timeout 2h ./test/vm -update`" + ` adds it. An emulated processor is slow: where words
here are of a time limit ("no end after 20s"), a real machine would have got to the next error.

`

// TestDocument holds docs/kernels.md to what was seen.
func TestDocument(t *testing.T) {
	const path = "../../../docs/kernels.md"
	have := document(read(t))
	if *update {
		if err := os.WriteFile(path, []byte(have), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != have {
		t.Error("docs/kernels.md is not made of test/vm/testdata: go test ./test/vm/seen -update")
	}
}

func read(t *testing.T) (all []Kernel) {
	files, err := filepath.Glob("../testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("nothing was seen", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var k Kernel
		if err := json.Unmarshal(text, &k); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b Kernel) int {
		return cmp.Or(cmp.Compare(a.Systemd, b.Systemd), cmp.Compare(a.Backend, b.Backend),
			cmp.Compare(a.Arch, b.Arch))
	})
	return all
}

func document(all []Kernel) string {
	var doc strings.Builder
	doc.WriteString(head)
	doc.WriteString("| Debian | kernel | architecture | iptables | systemd | backend |\n" +
		"|---|---|---|---|---|---|\n")
	for _, k := range all {
		fmt.Fprintf(&doc, "| %s | %s | %s | %s | %s | %s |\n", k.Release, k.Kernel, k.Arch, k.IPTables,
			k.Systemd, k.Backend)
	}
	doc.WriteString(`
## Without a module

The agent was stopped, the modules unloaded, and the file of the one moved away, before it was
started again. *On* is that both ways go through Envoy. The exit code
is that of ` + "`doctor`" + `. What was advised was then run, with the file back.

| absent | backend | kernels | IPv4 | IPv6 | finding | doctor | what brought it back |
|---|---|---|---|---|---|---|---|
`)
	var texts strings.Builder
	for _, g := range grouped(all) {
		a := g.absent
		fmt.Fprintf(&doc, "| %s | %s | %s | %s | %s | %s | %d | %s |\n", code(a.Module), g.backend,
			strings.Join(g.kernels, ", "), on(a.IPv4), on(a.IPv6), ids(a.Findings), a.Doctor,
			cmp.Or(quoted(a.Mended), "nothing was wrong"))
		if a.LastFailure == "" {
			continue
		}
		fmt.Fprintf(&texts, "\n**%s**, %s, %s:\n\n", a.Module, g.backend, strings.Join(g.kernels, ", "))
		fmt.Fprintf(&texts, "    %s\n", a.LastFailure)
	}
	if texts.Len() > 0 {
		doc.WriteString("\n### What `agent-last-failure` said\n")
		doc.WriteString(texts.String())
	}
	for _, part := range []struct {
		title string
		of    func(Kernel) []Finding
	}{
		{"A clock three hours ahead", func(k Kernel) []Finding { return k.Ahead }},
		{"A clock three hours behind", func(k Kernel) []Finding { return k.Behind }},
		{"A full table of connections", func(k Kernel) []Finding { return k.Conntrack }},
	} {
		said := map[string]bool{}
		for _, k := range all {
			for _, f := range part.of(k) {
				text := f.Cause + "; " + f.Next
				if len(said) == 0 {
					fmt.Fprintf(&doc, "\n## %s\n", part.title)
				}
				if !said[text] {
					fmt.Fprintf(&doc, "\n    %s: %s\n", f.Severity, text)
				}
				said[text] = true
			}
		}
	}
	return doc.String()
}

// group are the kernels of a backend on which the same was seen.
type group struct {
	backend string
	kernels []string
	absent  Absent
}

func grouped(all []Kernel) (out []group) {
	at := map[string]int{}
	for _, k := range all {
		for _, a := range k.Absent {
			// The version of iptables is in its words.
			a.LastFailure = strings.ReplaceAll(a.LastFailure, k.IPTables, "v1.8.x")
			key := fmt.Sprint(k.Backend, a.Module, a.LastFailure, a.IPv4, a.IPv6, ids(a.Findings), a.Doctor,
				a.Mended)
			n, there := at[key]
			if !there {
				n = len(out)
				at[key] = n
				out = append(out, group{backend: k.Backend, absent: a})
			}
			out[n].kernels = append(out[n].kernels, k.Kernel)
		}
	}
	slices.SortStableFunc(out, func(a, b group) int {
		return cmp.Or(cmp.Compare(b.backend, a.backend), cmp.Compare(a.absent.Module, b.absent.Module))
	})
	return out
}

func on(yes bool) string {
	if yes {
		return "on"
	}
	return "off"
}

func code(s string) string { return "`" + s + "`" }

// quoted is a command as code, and other words as they are.
func quoted(s string) string {
	if strings.HasPrefix(s, "sudo ") {
		return code(s)
	}
	return s
}

func ids(all []Finding) string {
	var out []string
	for _, f := range all {
		if s := f.Severity + " " + code(f.ID); f.Under == "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return cmp.Or(strings.Join(out, ", "), "none")
}
