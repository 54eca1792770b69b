package facts

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const root = "../.."

func facts(t *testing.T) []Fact {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, Page))
	if err != nil {
		t.Fatal(err)
	}
	return Parse(string(text))
}

// written are the ends of names of files that people write.
var written = []string{".go", ".md", ".sh", ".service", ".path", ".timer", ".target", ".conf", ".yml",
	".yaml", ".tf", ".css", ".js", ""}

// sources are the files of the repository in which people write: code, units, scripts, documents.
func sources(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if entry.IsDir() {
			others := []string{".git", "build", "dist", "testdata", "node_modules"}
			if slices.Contains(others, entry.Name()) || name == "test/facts" {
				return filepath.SkipDir
			}
			return nil
		}
		if !slices.Contains(written, filepath.Ext(name)) || !entry.Type().IsRegular() || name == Page {
			return nil
		}
		text, err := os.ReadFile(path)
		files[filepath.ToSlash(name)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestFacts holds the page against all that points to it.
func TestFacts(t *testing.T) {
	t.Parallel()
	all, files := facts(t), sources(t)
	if len(all) < 50 || len(files) < 500 {
		t.Fatalf("read %d facts and %d files: that is not the repository", len(all), len(files))
	}
	for _, problem := range Problems(all, files) {
		t.Error(problem)
	}
}

// TestProblems: each thing that may be wrong is found.
func TestProblems(t *testing.T) {
	t.Parallel()
	const shown = "Shown by `TestIt` of\n`some/where`."
	const page = "# The facts\n\n## Kernel\n\n### a-fact\n\nIt is so.\n\n" + shown + "\n\n## Envoy\n"
	const b = page + "\n### b-fact\n\n" + shown + "\n"
	good := map[string]string{"docs/design/it.md": "# How\n\n## It is\n",
		"some/where/it.go":      "// (" + Page + "#a-fact)\n",
		"some/where/it_test.go": "package where\n\nfunc TestIt(t *testing.T) {\n"}
	for _, tt := range []struct {
		name, page string
		file, text string
		want       string // "": nothing
	}{
		{name: "all is well", page: page},
		{name: "a document names the page", page: page, file: "README.md", text: Page},
		{name: "a call in code", page: page, file: "b.go", text: "Check(facts)"},
		{"no such fact", page, "b.go", Page + "#another", "b.go: there is no"},
		{"no fact named", page, "b.go", Page + " has it", "which part of it?"},
		{"a page of the design", page, "b.go", "docs/design/it.md#it-is", ""},
		{"no such part of it", page, "b.go", "docs/design/it.md#it-was", "b.go: there is no"},
		{"a link to no fact", page, "docs/design/c.md", "[c](facts.md#c-fact)", "there is no"},
		{"a link to a fact", page, "docs/design/c.md", "[a](facts.md#a-fact)", ""},
		{"a page without a place", page, "b.go", "(docs/design, that)", "leads nowhere"},
		{"facts without a target", page, "b.go", "// so (facts)", "(facts)\" leads nowhere"},
		{"a number", page, "b.service", "# contract 6", "b.service: \"contract 6\" leads nowhere"},
		{"a file of elsewhere", page, "b.go", "see facts/envoy.md", "leads nowhere"},
		{"twice", page + strings.TrimPrefix(page, "# The facts\n"), "", "", "two facts are called a-fact"},
		{"nobody points to it", b, "", "", "nobody points to b-fact"},
		{"a document alone points to it", b, "b.md", Page + "#b-fact",
			"nobody points to b-fact"},
		{"what rests on it is a page", b + "\nRests on it:\n[b](b.md).\n", "", "", ""},
		{"what rests on it is not named", b + "\nRests on it: all.\n", "", "", "nobody points to b-fact"},
		{"nothing shows it", strings.Replace(page, shown, "", 1), "", "", "no command and no test"},
		{"no such test", strings.Replace(page, "TestIt", "TestThat", 1), "", "", "no TestThat in some/where"},
		{"not there", strings.Replace(page, "some/where", "else/where", 1), "", "", "no TestIt in else/where"},
	} {
		files := map[string]string{tt.file: tt.text}
		for file, text := range good {
			files[file] = text
		}
		got := strings.Join(Problems(Parse(tt.page), files), "\n")
		if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: found %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	const page = "### a\n\nIt is so.\n\n```console\n# one\n> more\nanswer\n" +
		"# Warning: an answer\n# two\n```\n\n```console cloud\n# three\n```\n\n### b\n\n```console\nanswer\n```\n"
	want := [][]Command{
		{{"one\nmore", []string{"answer", "# Warning: an answer"}}, {"two", nil}, {"three", nil}},
		{{"false # an answer without a command: answer", nil}},
	}
	got := Parse(page)
	if len(got) != 2 || !got[0].NotRun || got[1].NotRun {
		t.Fatalf("%+v", got)
	}
	for i := range want {
		if diff := cmp.Diff(want[i], got[i].Shown); diff != "" {
			t.Error(diff)
		}
	}
}

func TestMatches(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		expected, lines string
		want            bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "", false},
		{"a", "a", true},
		{"a", "a  ", true},
		{"a", "b", false},
		{"a.c", "abc", false},
		{"a…c", "a, b and c", true},
		{"a…c", "a\nc", false},
		{"…|c", "a\nb\nc", true},
		{"…|c", "a\nb", false},
		{"a|…", "a", true},
		{"a|…|c", "a\nb\nb\nc", true},
		{"a|c", "a\nb\nc", false},
	} {
		var c Command
		var lines []string
		if tt.expected != "" {
			c.Expected = strings.Split(tt.expected, "|")
		}
		if tt.lines != "" {
			lines = strings.Split(tt.lines, "\n")
		}
		if got := c.Matches(lines); got != tt.want {
			t.Errorf("%q of %q: %v", tt.expected, tt.lines, got)
		}
	}
}
