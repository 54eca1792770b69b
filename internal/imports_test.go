// Package internal has the import rules of the whole module as a test, and nothing else.
package internal

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/service-proxy-agent/service-proxy-agent"

// may is who may import whom: each package of the program, and the packages of this module that its
// files, tests aside, may import. A new import belongs here, with a thought for what it drags
// along: the arrows go one way, from what decides to what it needs.
var may = map[string]string{
	// Flags, then construct, then run: the only place that knows both the daemon and the installer.
	"cmd/service-proxy-agent": "agent envoyadmin internal/atomicfile internal/attribute " +
		"internal/bootstrap internal/bundle internal/cloudlog internal/conntrack " +
		"internal/doctor internal/drain internal/envfile internal/exitcode internal/explain " +
		"internal/gather internal/metadata internal/page internal/pageserver internal/progress " +
		"internal/reconcile internal/rulediff internal/server internal/status internal/supervisor " +
		"internal/symptom internal/system internal/terminal internal/try iptables systemd",
	// What a release asks the go command.
	"deploy/licenses":       "",
	"deploy/packages/stage": "internal/layout internal/system systemd",

	// The daemon: everything but the installer.
	"agent": "envoyadmin guestattr internal/atomicfile internal/attribute internal/bundle " +
		"internal/cloudlog internal/conntrack internal/envoywatch internal/explain " +
		"internal/footprint internal/identity internal/layout internal/mailbox internal/metadata " +
		"internal/neighbour internal/progress internal/reconcile " +
		"internal/recording internal/report internal/route internal/rulediff internal/server " +
		"internal/sockdiag internal/status internal/symptom internal/try internal/untrusted " +
		"internal/users iptables systemd",
	// The two machines of the loop: neither knows the other, nor who runs them.
	"internal/reconcile": "internal/attribute internal/conntrack internal/status internal/symptom " +
		"iptables",
	"internal/envoywatch": "envoyadmin guestattr internal/attribute internal/mailbox " +
		"internal/symptom systemd",
	// Causes and next steps, of facts that others have found.
	"internal/symptom": "envoyadmin internal/attribute internal/layout internal/sockdiag iptables",
	// What `doctor` says of what these came to.
	"internal/doctor": "internal/exitcode internal/symptom internal/terminal",
	// What support gets of all that.
	"internal/bundle": "internal/envfile internal/redaction",
	"internal/gather": "envoyadmin internal/attribute internal/bundle internal/layout internal/metadata " +
		"internal/progress internal/symptom internal/untrusted systemd",
	// What becomes of one connection, of what others have seen.
	"internal/explain": "envoyadmin internal/symptom internal/terminal iptables",
	// What `status --html` shows of what others found.
	"internal/page": "internal/doctor internal/status internal/symptom iptables",
	// That page, live.
	"internal/pageserver": "internal/page internal/server internal/symptom",
	// What `diff` says of rules.
	"internal/rulediff": "internal/exitcode internal/terminal iptables",
	// What a look found, in JSON and back.
	"internal/recording": "envoyadmin internal/attribute internal/sockdiag iptables",
	// What the loop tells, and who passes it on.
	"internal/status": "internal/symptom internal/terminal",
	"internal/report": "envoyadmin guestattr internal/status internal/symptom iptables",
	"internal/cloudlog": "guestattr internal/authorities internal/metadata internal/redaction " +
		"internal/report",
	"internal/server": "guestattr internal/attribute internal/sockdiag internal/status " +
		"internal/webconfig",

	// Libraries that others may use, too: each needs a leaf or nothing.
	"envoyadmin": "internal/attribute internal/redaction",
	"guestattr":  "internal/metadata",
	"iptables":   "internal/xtables",
	"systemd":    "internal/atomicfile internal/layout",
	// For tests.
	"iptables/iptablestest":          "iptables",
	"internal/terminal/terminaltest": "internal/terminal",

	// The installer, and what it shares with the daemon.
	"internal/bootstrap": "envoyadmin guestattr internal/atomicfile internal/attribute " +
		"internal/authorities internal/drain internal/identity internal/layout internal/logs internal/metadata " +
		"internal/neighbour internal/progress internal/redaction internal/sockdiag " +
		"internal/supervisor internal/symptom internal/system internal/untrusted internal/users systemd",
	"internal/drain":      "envoyadmin systemd",
	"internal/supervisor": "internal/exitcode internal/redaction",
	"internal/logs":       "internal/untrusted",
	"internal/system":     "internal/authorities internal/exitcode internal/terminal",
	"internal/metadata":   "internal/attribute",
	// Google's closed agent beside us: the daemon tells of it, the installer takes over.
	"internal/neighbour": "internal/layout systemd",
	// One real connection beside what the rules say of it.
	"internal/try":      "internal/conntrack iptables",
	"internal/progress": "internal/atomicfile internal/identity internal/untrusted",
	"internal/identity": "internal/untrusted",

	// Leaves.
	"internal/atomicfile":  "",
	"internal/attribute":   "",
	"internal/authorities": "",
	"internal/conntrack":   "",
	"internal/layout":      "",
	"internal/envfile":     "",
	"internal/exitcode":    "",
	"internal/footprint":   "",
	"internal/mailbox":     "",
	"internal/redaction":   "",
	"internal/route":       "",
	"internal/sockdiag":    "",
	"internal/terminal":    "",
	"internal/untrusted":   "",
	"internal/users":       "",
	"internal/webconfig":   "",
	"internal/xtables":     "",
}

// only is who, tests aside, may import what has effects or is heavy: a path, or what begins with
// it.
var only = map[string]string{
	// Programs are run in five places: iptables alone changes rules, systemd talks with systemd,
	// bootstrap runs what installs, gather what shows support how the VM is, and supervisor Envoy.
	// deploy/licenses is no part of the program: it asks the go command.
	"os/exec": "iptables systemd internal/bootstrap internal/gather internal/supervisor " +
		"deploy/licenses",
	// Raw kernel interfaces.
	"github.com/mdlayher/netlink": "iptables internal/conntrack internal/sockdiag",
	"github.com/mdlayher/socket":  "internal/route",
	"unsafe":                      "iptables internal/xtables",
	// Envoy's types: reading them, deciding by them, writing the bootstrap configuration.
	"github.com/envoyproxy/go-control-plane": "envoyadmin agent internal/bootstrap",
	// One wrapper each.
	"cloud.google.com/go/compute/metadata": "internal/metadata",
	"github.com/coreos/go-iptables":        "iptables",
	"github.com/coreos/go-systemd":         "systemd",
	"github.com/fsnotify/fsnotify":         "envoyadmin",
	"github.com/go-json-experiment/json":   "envoyadmin internal/recording",
	"github.com/prometheus/client_golang":  "internal/report",
	"github.com/spf13":                     "cmd/service-proxy-agent",
	"net/http/pprof":                       "internal/server",
	"go.yaml.in/yaml":                      "internal/webconfig",
	"golang.org/x/crypto":                  "internal/webconfig",
	// What is for tests.
	"github.com/google/go-cmp":                 "",
	"github.com/santhosh-tekuri/jsonschema":    "",
	"testing":                                  "iptables/iptablestest internal/terminal/terminaltest",
	module + "/iptables/iptablestest":          "",
	module + "/internal/terminal/terminaltest": "",
	module + "/test":                           "",
	// What is at the top.
	module + "/internal/bootstrap":      "cmd/service-proxy-agent",
	module + "/agent":                   "cmd/service-proxy-agent",
	module + "/cmd/service-proxy-agent": "",
}

// onlyTests is the same for tests and what is in test/: those in a box read what bootstrap did,
// those end to end give the agent its settings.
var onlyTests = map[string]string{
	module + "/internal/bootstrap": "cmd/service-proxy-agent test/box",
	module + "/agent":              "cmd/service-proxy-agent test/e2e",
}

// source is who imports what in which files, by path within the module: one entry for the program's
// files of a package and one for its tests, whatever their build tags.
type source struct{ program, tests imports }

type imports map[string]map[string]string // package, imported path, one file that does

func (i imports) add(pkg, path, file string) {
	if i[pkg] == nil {
		i[pkg] = map[string]string{}
	}
	if path != "" {
		i[pkg][path] = file
	}
}

func read(root string) (source, error) {
	s := source{imports{}, imports{}}
	files := token.NewFileSet()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := d.Name()
		if d.IsDir() {
			if name != root && (base == "testdata" || base == "build" || base[0] == '.' || base[0] == '_') {
				return fs.SkipDir
			}
			// A module of its own has dependencies of its own.
			if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil && name != root {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(base, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		pkg := path.Dir(filepath.ToSlash(rel))
		of := s.program
		if strings.HasSuffix(base, "_test.go") || strings.HasPrefix(pkg, "test/") {
			of = s.tests
		}
		file, err := parser.ParseFile(files, name, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		of.add(pkg, "", rel)
		for _, spec := range file.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			of.add(pkg, path, rel)
		}
		return nil
	})
	return s, err
}

// check returns what breaks a rule, one line each.
func check(s source) (broken []string) {
	say := func(format string, args ...any) { broken = append(broken, fmt.Sprintf(format, args...)) }
	for _, pkg := range slices.Sorted(maps.Keys(s.program)) {
		allowed, known := may[pkg]
		if !known {
			say("%s has no row: say in imports_test.go what it may import", pkg)
			continue
		}
		for _, path := range slices.Sorted(maps.Keys(s.program[pkg])) {
			file := s.program[pkg][path]
			if to, ours := strings.CutPrefix(path, module+"/"); ours && !listed(allowed, to) {
				say("%s: %s may not import %s", file, pkg, to)
			}
		}
	}
	for pkg := range may {
		if _, there := s.program[pkg]; !there {
			say("%s has a row in imports_test.go and is not there", pkg)
		}
	}
	checkOnly(s.program, only, say)
	checkOnly(s.tests, onlyTests, say)
	for _, to := range []string{"internal/bootstrap", "internal/drain", "internal/logs"} {
		if by := s.program.way("agent", to, nil); by != nil {
			say("the daemon imports the installer: %s", strings.Join(by, " -> "))
		}
	}
	slices.Sort(broken)
	return broken
}

func checkOnly(all imports, rules map[string]string, say func(string, ...any)) {
	for pkg, paths := range all {
		for path, file := range paths {
			for what, who := range rules {
				itself := module+"/"+pkg == what || strings.HasPrefix(module+"/"+pkg, what+"/")
				if (path == what || strings.HasPrefix(path, what+"/")) && !itself && !listed(who, pkg) {
					say("%s: only these may import %s: %s", file, what, or(who, "nobody but tests"))
				}
			}
		}
	}
}

// way is a way from one package to another by imports, nil for none.
func (i imports) way(from, to string, seen map[string]bool) []string {
	if from == to {
		return []string{to}
	}
	if seen == nil {
		seen = map[string]bool{}
	}
	if seen[from] {
		return nil
	}
	seen[from] = true
	for _, path := range slices.Sorted(maps.Keys(i[from])) {
		if next, ours := strings.CutPrefix(path, module+"/"); ours {
			if rest := i.way(next, to, seen); rest != nil {
				return append([]string{from}, rest...)
			}
		}
	}
	return nil
}

func listed(list, what string) bool { return slices.Contains(strings.Fields(list), what) }

func or(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// TestImports fails where a package imports what it should not know.
func TestImports(t *testing.T) {
	text, err := os.ReadFile("../go.mod")
	if err != nil || !strings.HasPrefix(string(text), "module "+module+"\n") {
		t.Fatalf("not the module's folder: %v", err)
	}
	s, err := read("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range check(s) {
		t.Error(line)
	}
}

// TestImportsSeesViolations plants imports in what the module has, one at a time.
func TestImportsSeesViolations(t *testing.T) {
	for _, tt := range []struct{ pkg, path, want string }{
		{"agent", module + "/internal/bootstrap", "agent may not import internal/bootstrap"},
		{"agent", module + "/internal/bootstrap", "agent -> internal/bootstrap"},
		{"internal/metadata", module + "/internal/bootstrap", "agent -> "},
		{"internal/reconcile", module + "/agent", "internal/reconcile may not import agent"},
		{"internal/reconcile", module + "/internal/envoywatch", "may not import internal/envoywatch"},
		{"internal/envoywatch", module + "/internal/reconcile", "may not import internal/reconcile"},
		{"internal/symptom", module + "/guestattr", "internal/symptom may not import guestattr"},
		{"iptables", module + "/internal/sockdiag", "iptables may not import internal/sockdiag"},
		{"guestattr", "os/exec", "only these may import os/exec"},
		{"agent", "github.com/mdlayher/netlink/nlenc", "only these may import github.com/mdlayher"},
		{"systemd", module + "/test/platform", "nobody but tests"},
		{"internal/new", "", "internal/new has no row"},
	} {
		s, err := read("..")
		if err != nil {
			t.Fatal(err)
		}
		s.program.add(tt.pkg, tt.path, "planted.go")
		if broken := strings.Join(check(s), "\n"); !strings.Contains(broken, tt.want) {
			t.Errorf("%s imports %s: want %q in %q", tt.pkg, tt.path, tt.want, broken)
		}
	}
	s, err := read("..")
	if err != nil {
		t.Fatal(err)
	}
	s.tests.add("test/e2e", module+"/internal/bootstrap", "planted_test.go")
	want := "planted_test.go: only these may import " + module + "/internal/bootstrap"
	if broken := check(s); len(broken) != 1 || !strings.HasPrefix(broken[0], want) {
		t.Errorf("a test: %q", broken)
	}
	delete(s.program, "internal/mailbox")
	want = "internal/mailbox has a row"
	if broken := strings.Join(check(s), "\n"); !strings.Contains(broken, want) {
		t.Errorf("a package that is gone: %q", broken)
	}
}
