package docs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

const sample = "# A `page`: it's *one*\n\nWords `in one`, `over\ntwo lines`.\n\n" +
	"    $ sudo make x  what it does\n    said\n\n    $ gcloud a \\\n      --b=c\n\n" +
	"## Again\n\n- a list\n\n      of words\n\n## Again\n\n```sh\nanything --x # y\n```\n\n" +
	"    make y && test/z.sh >out\n    no command\n\n```console\n# ls x\nmake no\n```\n"

func TestRead(t *testing.T) {
	p := Read("p.md", sample)
	for _, want := range []string{"a-page-its-one", "again", "again-1"} {
		if !p.Anchors()[want] {
			t.Errorf("no anchor %s in %v", want, p.Anchors())
		}
	}
	texts := func(all []Said) (texts []string) {
		for _, s := range all {
			texts = append(texts, s.Text)
		}
		return texts
	}
	want := []string{"page", "in one", "over two lines"}
	if got := texts(p.Spans()); !slices.Equal(got, want) {
		t.Errorf("spans %q, want %q", got, want)
	}
	want = []string{"sudo make x", "gcloud a --b=c", "anything --x # y", "make y && test/z.sh >out",
		"ls x"}
	if got := texts(p.Commands()); !slices.Equal(got, want) {
		t.Errorf("commands %q, want %q", got, want)
	}
	if got := p.Commands()[1].Line; got != 9 {
		t.Errorf("the second command is in line %d", got)
	}
	line := `gcloud compute ssh VM --command 'sudo x "y" -f -' 2>&1 >b.tgz|grep a&&c; d`
	words := []string{"gcloud", "compute", "ssh", "VM", "--command", `sudo x "y" -f -`, "|", "grep",
		"a", "&&", "c", ";", "d"}
	if got := Words(line); !slices.Equal(got, words) {
		t.Errorf("words %q, want %q", got, words)
	}
}

// TestLinks: each link to another file or heading of this repository leads there.
func TestLinks(t *testing.T) {
	pages := map[string]Page{}
	for _, p := range Pages(t, root) {
		pages[p.Name] = p
	}
	links, reached := 0, map[string]bool{"README.md": true}
	for _, p := range pages {
		for _, link := range p.Links() {
			if strings.Contains(link.Text, "://") || strings.HasPrefix(link.Text, "mailto:") {
				continue
			}
			links++
			name, anchor, _ := strings.Cut(link.Text, "#")
			target := p.Name
			if name != "" {
				target = filepath.Join(filepath.Dir(p.Name), name)
			}
			reached[target] = true
			page, isPage := pages[target]
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s:%d: %s: no such file", p.Name, link.Line, link.Text)
			} else if anchor != "" && (!isPage || !page.Anchors()[anchor]) {
				t.Errorf("%s:%d: %s: no such heading", p.Name, link.Line, link.Text)
			}
		}
	}
	if links < 100 {
		t.Errorf("only %d links were found", links)
	}
	for name := range pages {
		dir := filepath.Dir(name)
		if !reached[name] && !(filepath.Base(name) == "README.md" && reached[dir]) && dir != "." {
			t.Errorf("no page links to %s", name)
		}
	}
}
