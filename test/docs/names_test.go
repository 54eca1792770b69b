package docs

import (
	"go/scanner"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// repository is what the code has that documents may name.
type repository struct {
	literals map[string]bool     // string constants of the program, whole
	words    map[string]bool     // and the words in them, and in struct tags
	env      map[string]bool     // variables of the environment that it reads
	tests    map[string][]string // functions TestX, FuzzX and BenchmarkX, and the folders of each
	flags    map[string]bool     // of tests
	source   map[string]string   // text of the folders with tests, by folder
	files    []string
}

var program = []string{"agent", "cmd", "envoyadmin", "guestattr", "internal", "iptables", "systemd"}

var theRepository = sync.OnceValues(func() (*repository, error) {
	r := &repository{map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string][]string{},
		map[string]bool{}, map[string]string{}, nil}
	err := fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
		top, _, _ := strings.Cut(name, "/")
		switch {
		case err != nil:
			return err
		case d.IsDir() && (top == "build" || top == "dist" ||
			len(name) > 1 && top[0] == '.' && top != ".ci"):
			return fs.SkipDir
		}
		r.files = append(r.files, name)
		isTest := strings.HasSuffix(name, "_test.go")
		if filepath.Ext(name) != ".go" || !isTest && !slices.Contains(program, top) && top != "test" {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if isTest {
			for _, m := range testRE.FindAllSubmatch(text, -1) {
				r.tests[string(m[1])] = append(r.tests[string(m[1])], path.Dir(name))
			}
			for _, m := range flagRE.FindAllSubmatch(text, -1) {
				r.flags[string(m[1])] = true
			}
		}
		if isTest || top == "test" {
			r.source[path.Dir(name)] += string(text)
			return err
		}
		for _, m := range getenvRE.FindAllSubmatch(text, -1) {
			r.env[string(m[1])] = true
		}
		r.strings(text)
		return err
	})
	return r, err
})

var (
	testRE   = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Za-z0-9_]*)\(`)
	getenvRE = regexp.MustCompile(`os\.(?:Getenv|LookupEnv)\("([A-Z_]+)"\)`)
	flagRE   = regexp.MustCompile(`\bflag\.\w+\("([a-z.]+)"`)
	wordRE   = regexp.MustCompile(`[A-Za-z0-9_]+(?:[-.][A-Za-z0-9_]+)*`)
)

// strings adds the string constants of a file.
func (r *repository) strings(text []byte) {
	var s scanner.Scanner
	file := token.NewFileSet()
	s.Init(file.AddFile("", file.Base(), len(text)), text, nil, 0)
	for {
		_, tok, lit := s.Scan()
		if tok == token.EOF {
			return
		}
		if tok != token.STRING {
			continue
		}
		if said, err := strconv.Unquote(lit); err == nil {
			r.literals[said] = true
			for _, word := range wordRE.FindAllString(said, -1) {
				r.words[word] = true
			}
		}
	}
}

func code(t *testing.T) *repository {
	t.Helper()
	r, err := theRepository()
	if err != nil || len(r.literals) < 1000 || len(r.tests) < 300 || len(r.env) < 8 {
		t.Fatalf("%d constants, %d tests, %d variables: %v", len(r.literals), len(r.tests), len(r.env),
			err)
	}
	return r
}

// names are what is looked for, and whether it is there. A test that finds few looks wrongly.
type names struct {
	*testing.T
	*repository
	pages   []Page
	foreign map[string]bool // what foreign.txt says is of others
	found   int
}

func newNames(t *testing.T) *names {
	n := &names{T: t, repository: code(t), pages: Pages(t, root), foreign: map[string]bool{}}
	text, err := os.ReadFile("foreign.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if word, whose, _ := strings.Cut(strings.TrimSpace(line), " "); word != "" && word != "#" {
			if strings.TrimSpace(whose) == "" {
				t.Errorf("foreign.txt does not say whose %s is", word)
			}
			n.foreign[word] = true
		}
	}
	return n
}

// is counts a name, and says so where it is nobody's.
func (n *names) is(there bool, at Said, what, name string) {
	n.Helper()
	n.found++
	if !there && !n.foreign[name] {
		n.Errorf("%s:%d: `%s`: there is no %s %s; if it is another program's, say so in "+
			"test/docs/foreign.txt", at.Page, at.Line, at.Text, what, name)
	}
}

func (n *names) end(least int) {
	n.Helper()
	if n.found < least {
		n.Errorf("only %d names were found", n.found)
	}
}

// each calls f for each span and line of a code block.
func (n *names) each(f func(at Said)) {
	for _, p := range n.pages {
		for _, s := range p.Spans() {
			f(s)
		}
		for _, s := range p.Blocks() {
			f(s)
		}
	}
}

// named says whether a document has the name as a word of its own.
func named(pages []Page, name string) bool {
	return slices.ContainsFunc(pages, func(p Page) bool {
		for text := p.Text; ; {
			at := strings.Index(text, name)
			if at < 0 {
				return false
			}
			end := at + len(name)
			if (at == 0 || !isWord(text[at-1])) && (end == len(text) || !isWord(text[end])) {
				return true
			}
			text = text[end:]
		}
	})
}

func isWord(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// reference are the pages that are made of the code, and so the list of what there is of a sort.
func reference(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestUnits(t *testing.T) {
	n := newNames(t)
	units := map[string]bool{}
	entries, err := os.ReadDir(filepath.Join(root, "systemd/units"))
	if err != nil || len(entries) < 10 {
		t.Fatal(len(entries), err)
	}
	for _, e := range entries {
		units[e.Name()] = true
		if !named(n.pages, e.Name()) {
			t.Errorf("no document names %s", e.Name())
		}
	}
	unit := regexp.MustCompile(`service-proxy-[a-z-]+\.(?:service|path|timer|target|socket)\b`)
	n.each(func(at Said) {
		for _, name := range unit.FindAllString(at.Text, -1) {
			n.is(units[name] || n.literals[name], at, "unit", name)
		}
	})
	n.end(20)
}

// TestPaths: what documents say lies on a VM is in docs/files.md, or a constant of the program.
func TestPaths(t *testing.T) {
	n := newNames(t)
	var known []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(/[^`]+)` \\|").FindAllStringSubmatch(
		reference(t, "files.md"), -1) {
		known = append(known, alternatives(m[1])...)
	}
	if len(known) < 50 {
		t.Fatalf("docs/files.md has %d paths", len(known))
	}
	path := regexp.MustCompile(`(?:^|[\s=:'"(])(/(?:etc|run|usr|var)/(?:\{\S*\}|[^\s:'",;()|<>])*)`)
	// What the archive has beneath /usr/local, a distribution's package has beneath /usr.
	ofPackage := regexp.MustCompile(`^/usr/(bin|lib|share)/`)
	n.each(func(at Said) {
		for _, m := range path.FindAllStringSubmatch(at.Text, -1) {
			name := strings.TrimRight(m[1], ".:…/")
			if !strings.Contains(name, "service-proxy") && !strings.HasPrefix(name, "/var/log/envoy") &&
				!strings.HasPrefix(name, "/usr/local/bin/envoy") ||
				strings.HasPrefix(name, "/var/tmp/") {
				continue
			}
			for _, one := range alternatives(name) {
				local := ofPackage.ReplaceAllString(one, "/usr/local/$1/")
				n.is(n.literals[one] || slices.ContainsFunc(known, func(k string) bool {
					in, _ := filepath.Match(strings.TrimSuffix(k, "/"), local)
					of, _ := filepath.Match(local, strings.TrimSuffix(k, "/"))
					return in || of || strings.HasPrefix(k, local+"/") ||
						strings.HasSuffix(k, "/") && strings.HasPrefix(local, k)
				}), at, "path", one)
			}
		}
	})
	n.end(60)
}

// alternatives are the paths that one with {a,b} stands for.
func alternatives(path string) []string {
	before, rest, found := strings.Cut(path, "{")
	at := closing(rest)
	if !found || at < 0 {
		return []string{path}
	}
	var all []string
	depth, begin := 0, 0
	words := rest[:at] + ","
	for i, r := range words {
		switch {
		case r == '{':
			depth++
		case r == '}':
			depth--
		case r == ',' && depth == 0:
			all = append(all, alternatives(before+words[begin:i]+rest[at+1:])...)
			begin = i + 1
		}
	}
	return all
}

// closing is where the } is that ends what has begun.
func closing(text string) int {
	depth := 0
	for i, r := range text {
		switch r {
		case '{':
			depth++
		case '}':
			if depth--; depth < 0 {
				return i
			}
		}
	}
	return -1
}

// TestVariables: of the environment, and the chains and fields of the journal that look alike.
func TestVariables(t *testing.T) {
	n := newNames(t)
	flags := map[string]bool{}
	for _, page := range []string{"settings.md", "commands.md"} {
		for _, m := range regexp.MustCompile("(?m)^\\| `(?:-[a-z], )?--([a-z-]+)[ `]").
			FindAllStringSubmatch(reference(t, page), -1) {
			flags[strings.ToUpper(strings.ReplaceAll(m[1], "-", "_"))] = true
		}
	}
	if len(flags) < 35 {
		t.Fatalf("only %d flags", len(flags))
	}
	name := regexp.MustCompile(`\bSERVICE_PROXY_[A-Z0-9_]+\b`)
	catalog, err := os.ReadFile(filepath.Join(root, "systemd/catalog/service-proxy-agent.catalog"))
	if err != nil {
		t.Fatal(err)
	}
	bucket := regexp.MustCompile(`^SERVICE_PROXY_B[46]_`)
	n.each(func(at Said) {
		for _, name := range name.FindAllString(at.Text, -1) {
			twin, isTwin := strings.CutPrefix(name, "SERVICE_PROXY_AGENT_")
			n.is(isTwin && flags[twin] || n.literals[name] || bucket.MatchString(name) ||
				strings.Contains(string(catalog), "@"+name+"@"), at, "variable, chain or field", name)
		}
	})
	n.end(40)
	for literal := range n.literals {
		if name.FindString(literal) == literal && literal != "" && !strings.HasSuffix(literal, "_") &&
			!named(n.pages, literal) {
			t.Errorf("no document names %s", literal)
		}
	}
	for name := range n.env {
		if !named(n.pages, name) {
			t.Errorf("no document names the variable %s, which the program reads", name)
		}
	}
}

func TestMetrics(t *testing.T) {
	n := newNames(t)
	metrics := map[string]bool{}
	row := regexp.MustCompile("(?m)^\\| `service_proxy_agent_([a-z_]+)` \\| (?:gauge|counter|hist)")
	for _, m := range row.FindAllStringSubmatch(reference(t, "metrics.md"), -1) {
		metrics[m[1]] = true
	}
	recorded := map[string]bool{}
	rules, err := filepath.Glob(filepath.Join(root, "deploy/prometheus/rules/*.yml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range rules {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`record: (\S+)`).FindAllStringSubmatch(string(text), -1) {
			recorded[m[1]] = true
		}
	}
	if len(metrics) < 40 || len(recorded) < 10 {
		t.Fatalf("%d metrics, %d recorded", len(metrics), len(recorded))
	}
	metric := regexp.MustCompile(`[a-z_0-9]*:?service_proxy_agent_([a-z_0-9]*)(?::[a-z_0-9]+)?`)
	short := regexp.MustCompile(`…(_[a-z_]+)`)
	ofHistogram := regexp.MustCompile(`_(bucket|count|sum)$`)
	n.each(func(at Said) {
		for _, m := range metric.FindAllStringSubmatch(at.Text, -1) {
			n.is(m[1] == "" || recorded[m[0]] || metrics[m[1]] ||
				metrics[ofHistogram.ReplaceAllString(m[1], "")], at, "metric", m[0])
		}
		for _, m := range short.FindAllStringSubmatch(at.Text, -1) {
			n.is(slices.ContainsFunc(slices.Collect(maps.Keys(metrics)), func(name string) bool {
				return strings.HasSuffix("_"+name, m[1])
			}), at, "metric that ends in", m[1])
		}
	})
	n.end(12)
}

// TestFindings: IDs where only one can stand, and that each has its section.
func TestFindings(t *testing.T) {
	n := newNames(t)
	ids := map[string]bool{}
	page := Read("symptoms.md", reference(t, "symptoms.md"))
	for _, k := range symptom.Kinds() {
		ids[string(k.ID)] = true
		if !page.Anchors()[string(k.ID)] {
			t.Errorf("docs/symptoms.md has no section %s", k.ID)
		}
	}
	id := regexp.MustCompile(`(?:finding\{id="|SERVICE_PROXY_ID=|finding=|--ignore[ =])([a-z-]+)`)
	n.each(func(at Said) {
		for _, m := range id.FindAllStringSubmatch(at.Text, -1) {
			n.is(ids[m[1]] || m[0] == "finding=none", at, "finding", m[1])
		}
	})
	n.end(15)
}

// TestWords: a span that is one name, like `intercept-dns`, a flag or a test, is one of the
// program's.
func TestWords(t *testing.T) {
	n := newNames(t)
	flag := regexp.MustCompile(`^--([a-z][a-z-]+)(?:[= ].*)?$`)
	kebab := regexp.MustCompile(`^[a-z]+(?:-[a-z0-9]+)+$`)
	test := regexp.MustCompile(`^(?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9]*`)
	for _, p := range n.pages {
		for _, s := range p.Spans() {
			switch {
			case flag.MatchString(s.Text):
				name := flag.FindStringSubmatch(s.Text)[1]
				n.is(n.literals[name] || name == "help", s, "flag", "--"+name)
			case kebab.MatchString(s.Text):
				n.is(n.words[s.Text], s, "word of the program", s.Text)
			case test.MatchString(s.Text):
				n.is(n.tests[test.FindString(s.Text)] != nil || strings.HasSuffix(s.Text, "X"), s, "test",
					s.Text)
			}
		}
	}
	n.end(200)
}

// TestFiles: files of this repository that documents name.
func TestFiles(t *testing.T) {
	n := newNames(t)
	path := regexp.MustCompile(`^(?:\.ci|agent|cmd|deploy|docs|envoyadmin|guestattr|internal|` +
		`iptables|systemd|test)/[A-Za-z0-9_.*/-]+$`)
	goName := regexp.MustCompile(`\.[A-Z]\w*$`) // internal/reconcile.Family
	for _, p := range n.pages {
		for _, s := range p.Spans() {
			name := goName.ReplaceAllString(strings.TrimRight(s.Text, "/"), "")
			if !path.MatchString(name) {
				continue
			}
			n.is(slices.ContainsFunc(n.files, func(file string) bool {
				ok, err := filepath.Match(name, file)
				return ok && err == nil
			}), s, "file", name)
		}
	}
	n.end(20)
}

// TestExitCodes: no other code is named than those that there are.
func TestExitCodes(t *testing.T) {
	n := newNames(t)
	codes := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(
		reference(t, "exit-codes.md"), -1) {
		codes[m[1]] = true
	}
	code := regexp.MustCompile(`(?i)\bexit codes? (\d+)`)
	for _, p := range n.pages {
		for _, m := range code.FindAllStringSubmatch(p.Text, -1) {
			n.is(codes[m[1]], Said{p.Name, 0, m[0]}, "exit code", m[1])
		}
	}
	n.end(10)
}

// TestTargets: those of make, and the groups of the soak.
func TestTargets(t *testing.T) {
	n := newNames(t)
	targets, groups := map[string]bool{}, map[string]bool{}
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	rule := regexp.MustCompile(`(?m)^([a-z -]+):.*## `)
	for _, m := range rule.FindAllStringSubmatch(string(makefile), -1) {
		for target := range strings.FieldsSeq(m[1]) {
			targets[target] = true
			if target != "help" && !named(n.pages, "make "+target) && !named(n.pages, target) {
				t.Errorf("no document names make %s", target)
			}
		}
	}
	soak, err := os.ReadFile(filepath.Join(root, "test/soak.sh"))
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(soak), "for g in ")
	list, _, _ = strings.Cut(list, ";")
	for group := range strings.FieldsSeq(list) {
		groups[group] = true
		if !named(n.pages, group) {
			t.Errorf("no document names the soak's group %s", group)
		}
	}
	if len(targets) < 15 || len(groups) < 10 {
		t.Fatalf("%d targets, %d groups", len(targets), len(groups))
	}
	target := regexp.MustCompile(`^ *(?:\$ )?(?:sudo )?make ([a-z]+)`)
	group := regexp.MustCompile(`GROUP=([a-z0-9|-]+)`)
	n.each(func(at Said) {
		if m := target.FindStringSubmatch(at.Text); m != nil {
			n.is(targets[m[1]], at, "target", m[1])
		}
		for _, m := range group.FindAllStringSubmatch(at.Text, -1) {
			for one := range strings.SplitSeq(strings.Trim(m[1], "|"), "|") {
				n.is(groups[one] || one == "name", at, "group", one)
			}
		}
	})
	n.end(20)
}
