// Package docs reads the documents of this repository, so that tests can hold what they say against
// the code: links, names, and the command lines that they have somebody type.
//
// It judges nothing. Its own tests hold what needs no program; that of cmd/service-proxy-agent has
// the commands parse their lines, and those of the packages that make a page keep it fresh.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Page is a document.
type Page struct {
	Name  string // its path in the repository
	Text  string
	lines []line
}

// line is one of a page: whether it is in a code block, and in which: they have numbers.
type line struct {
	text  string
	block int    // 0: none, -1: its fence
	kind  string // of a fenced block, what stands behind the fence
}

// Pages are the documents below root, the repository's top: all Markdown but what is built.
func Pages(t *testing.T, root string) (pages []Page) {
	t.Helper()
	err := fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == "build" || name == "dist" || d.Name() == "testdata" ||
			len(name) > 1 && d.Name()[0] == '.'):
			return fs.SkipDir
		case filepath.Ext(name) != ".md":
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		pages = append(pages, Read(name, string(text)))
		return err
	})
	if err != nil || len(pages) < 10 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	return pages
}

var listItem = regexp.MustCompile(`^ *([-*+]|\d+\.) `)

// Read takes a page apart. A block is between fences, or indented by four columns after an empty
// line, and not part of a list.
func Read(name, text string) Page {
	p := Page{Name: name, Text: text}
	blocks, fence, kind := 0, "", ""
	indented, inList, empty := false, false, true
	for row := range strings.SplitSeq(text, "\n") {
		bare := strings.TrimSpace(row)
		l := line{text: row}
		switch {
		case fence != "":
			l.block, l.kind = blocks, kind
			if strings.HasPrefix(bare, fence) && strings.Trim(bare, fence[:1]) == "" {
				fence, l.block = "", -1
			}
		case strings.HasPrefix(bare, "```") || strings.HasPrefix(bare, "~~~"):
			fence = bare[:3]
			kind = strings.TrimLeft(bare, fence[:1])
			blocks++
			l.block = -1
		case strings.HasPrefix(row, "    ") && (indented || empty && !inList):
			if !indented {
				blocks++
			}
			indented, l.block = true, blocks
		case bare == "":
			if indented { // more of it may follow
				l.block = blocks
			}
		default:
			indented = false
			inList = listItem.MatchString(row) || inList && strings.HasPrefix(row, "  ")
		}
		empty = bare == ""
		p.lines = append(p.lines, l)
	}
	return p
}

var (
	headingRE = regexp.MustCompile(`^#{1,6} (.*)$`)
	anchorRE  = regexp.MustCompile(`<a (?:id|name)="([^"]+)"`)
	linkRE    = regexp.MustCompile(`\]\(([^)\s]+)(?: "[^"]*")?\)`)
	notAnchor = regexp.MustCompile(`[^\p{L}\p{N}\p{M}_ -]`)
	linked    = regexp.MustCompile(`!?\[([^\]]*)\]\([^)]*\)`)
)

// Anchors are those of the page, as GitHub gives them: a heading in lower case, without what is no
// letter, digit, - or _, with - for each blank, and -1 and so on where it comes again.
func (p Page) Anchors() map[string]bool {
	all := map[string]bool{}
	for _, l := range p.lines {
		if l.block != 0 {
			continue
		}
		for _, m := range anchorRE.FindAllStringSubmatch(l.text, -1) {
			all[m[1]] = true
		}
		m := headingRE.FindStringSubmatch(l.text)
		if m == nil {
			continue
		}
		heading := strings.ToLower(linked.ReplaceAllString(strings.TrimSpace(m[1]), "$1"))
		anchor := strings.ReplaceAll(notAnchor.ReplaceAllString(heading, ""), " ", "-")
		next := anchor
		for n := 1; all[next]; n++ {
			next = anchor + "-" + string(rune('0'+n))
		}
		all[next] = true
	}
	return all
}

// Said is something that a page says, and where.
type Said struct {
	Page string
	Line int
	Text string
}

// Links are the targets of its links and pictures.
func (p Page) Links() (all []Said) {
	for i, l := range p.lines {
		if l.block != 0 {
			continue
		}
		for _, m := range linkRE.FindAllStringSubmatch(l.text, -1) {
			all = append(all, Said{p.Name, i + 1, m[1]})
		}
	}
	return all
}

// Spans are its words in backquotes. One may go on in the next line.
func (p Page) Spans() (all []Said) {
	open, at := "", 0
	for i, l := range p.lines {
		if l.block != 0 || strings.TrimSpace(l.text) == "" {
			open, at = "", 0 // a paragraph's end ends it
			continue
		}
		for n, piece := range strings.Split(l.text, "`") {
			switch {
			case n == 0 && at > 0:
				open += " " + strings.TrimSpace(piece)
			case n == 0:
			case at > 0:
				all = append(all, Said{p.Name, at, open})
				open, at = "", 0
			default:
				open, at = piece, i+1
			}
		}
	}
	return all
}

// Blocks are the lines of its code blocks.
func (p Page) Blocks() (all []Said) {
	for i, l := range p.lines {
		if l.block > 0 {
			all = append(all, Said{p.Name, i + 1, l.text})
		}
	}
	return all
}

// programs begin a line that somebody is to type, in a block that has no other mark of it.
var programs = []string{"apt", "apt-get", "cd", "cp", "curl", "dmesg", "dnf", "docker", "dpkg",
	"envoy", "export", "gcloud", "git", "go", "gsutil", "ip", "iptables", "iptables-save", "ip6tables",
	"journalctl", "kubectl", "lsof", "make", "mandoc", "nft", "podman", "promtool", "python3", "pip",
	"rpm", "service-proxy-agent", "shutdown", "ss", "sudo", "systemctl", "systemd-run", "tar",
	"terraform", "zypper"}

// Commands are the command lines of its blocks, joined where they go on behind a \, and without
// what explains them behind two blanks. In a block with a prompt ($, or # in one of kind console)
// these are the lines behind one; in one of kind sh, bash or shell all; else those that begin with
// one of programs, or with one of our scripts.
func (p Page) Commands() (all []Said) {
	prompts := map[int]bool{}
	for _, l := range p.lines {
		if _, prompted := l.prompted(); l.block > 0 && prompted {
			prompts[l.block] = true
		}
	}
	for i := 0; i < len(p.lines); i++ {
		l := p.lines[i]
		bare, prompted := l.prompted()
		shell := slices.Contains([]string{"sh", "bash", "shell"}, l.kind)
		first, _, _ := strings.Cut(bare, " ")
		switch {
		case l.block <= 0 || bare == "" || strings.HasPrefix(bare, "#"):
			continue
		case prompts[l.block]:
			if !prompted {
				continue
			}
		case !shell && !slices.Contains(programs, first) && !strings.HasSuffix(first, ".sh"):
			continue
		}
		at := i
		for strings.HasSuffix(bare, `\`) && i+1 < len(p.lines) {
			i++
			bare = strings.TrimSpace(strings.TrimSuffix(bare, `\`)) + " " +
				strings.TrimSpace(p.lines[i].text)
		}
		bare, _, _ = strings.Cut(bare, "  ")
		all = append(all, Said{p.Name, at + 1, bare})
	}
	return all
}

// prompted is a line without its prompt, if it has one.
func (l line) prompted() (bare string, prompted bool) {
	bare = strings.TrimSpace(l.text)
	for _, prompt := range []string{"$ ", "# "} {
		rest, found := strings.CutPrefix(bare, prompt)
		if found && (prompt == "$ " || l.kind == "console") {
			return rest, true
		}
	}
	return bare, false
}

// Words are a command line's as a shell splits it; what parts commands (&& | ;) is a word of its
// own, and where output goes is left out.
func Words(command string) (words []string) {
	var word strings.Builder
	in, some, parts := rune(0), false, false
	end := func() {
		if some {
			words = append(words, word.String())
		}
		word.Reset()
		some, parts = false, false
	}
	for _, r := range command {
		isPart := strings.ContainsRune("|&;", r) && !strings.HasSuffix(word.String(), ">")
		switch {
		case in != 0 && r == in:
			in = 0
			continue
		case in == 0 && r == ' ':
			end()
			continue
		case in == 0 && isPart != parts:
			end()
			parts = isPart
		}
		some = true
		if in == 0 && (r == '\'' || r == '"') {
			in = r
			continue
		}
		word.WriteRune(r)
	}
	end()
	return slices.DeleteFunc(words, redirection.MatchString)
}

var redirection = regexp.MustCompile(`^\d?>>?&?[^ ]*$`)

// Row is one of commands.txt: what becomes of command lines.
type Row struct {
	How  string // a test's name, or cloud, vm, here
	Line string // … stands for anything; perhaps behind the name of a page, and ": "
	re   *regexp.Regexp
}

// Rows are those of commands.txt.
func Rows(t *testing.T, root string) (rows []Row) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "test/docs/commands.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		how, pattern, _ := strings.Cut(strings.TrimSpace(line), " ")
		if how == "" || strings.HasPrefix(how, "#") {
			continue
		}
		pattern = strings.TrimSpace(pattern)
		re := strings.ReplaceAll(regexp.QuoteMeta(pattern), "…", ".*")
		rows = append(rows, Row{how, pattern, regexp.MustCompile("^" + re + "$")})
	}
	return rows
}

// Of says whether the row is that of a command line.
func (r Row) Of(c Said) bool {
	return r.re.MatchString(c.Text) || r.re.MatchString(c.Page+": "+c.Text)
}

// InLab are the command lines of documents that no row is of, without sudo: TestHelpExamples of
// test/e2e runs them, each once.
func InLab(t *testing.T, root string) (lines []string) {
	t.Helper()
	rows := Rows(t, root)
	for _, p := range Pages(t, root) {
		for _, c := range p.Commands() {
			line := strings.TrimPrefix(c.Text, "sudo ")
			if !slices.ContainsFunc(rows, func(r Row) bool { return r.Of(c) }) &&
				!slices.Contains(lines, line) {
				lines = append(lines, line)
			}
		}
	}
	return lines
}
