package page

import (
	"go/ast"
	"go/parser"
	"go/token"
	"html"
	"maps"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	xhtml "golang.org/x/net/html"
)

// allowed are the elements of a page, each with the attributes that it may have.
var allowed = map[string]string{
	"html": "lang", "head": "", "meta": "charset http-equiv content name", "title": "id", "style": "",
	"body": "", "a": "class href", "header": "class", "p": "class", "strong": "", "span": "class",
	"time": "datetime", "main": "id", "section": "class id aria-labelledby", "nav": "class aria-label",
	"h1": "id", "h2": "id", "h3": "", "h4": "", "h5": "", "h6": "",
	"div": "class role tabindex aria-label aria-hidden",
	"dl":  "class", "dt": "", "dd": "", "ul": "class", "ol": "class", "li": "", "article": "class id",
	"code": "", "pre": "class tabindex role aria-label aria-labelledby",
	"details": "class", "summary": "",
	"q": "", "figure": "class", "figcaption": "", "footer": "", "table": "class", "caption": "",
	"thead": "", "tbody": "", "tr": "", "th": "scope class", "td": "class", "wbr": "",
	"svg":    "class viewBox width height aria-hidden aria-labelledby role preserveAspectRatio",
	"symbol": "id viewBox", "use": "href", "g": "class", "path": "class d",
	"rect": "class x y width height",
	"form": "method action", "label": "for", "fieldset": "", "legend": "", "button": "type",
	"input": "id name type value placeholder autocomplete spellcheck required checked",
}

var voids = []string{"meta", "input", "wbr"}

// where are the targets that a page may lead to.
var where = regexp.MustCompile(`^(#[a-z0-9-]+|\./(\?paused=1)?|explain(\?to=[A-Za-z0-9.%]+)?)$`)

// written is a tag: name="value" and nothing else.
var written = regexp.MustCompile(`^<[a-z0-9]+( [a-zA-Z-]+="[^"<>]*"| required| checked)*>$`)

// TestStructure reads all pages by tokens: what a browser would mend in silence fails here.
func TestStructure(t *testing.T) {
	for name, text := range pages(t) {
		t.Run(name, func(t *testing.T) { check(t, text) })
	}
}

// document is what was read of a page.
type document struct {
	t      *testing.T
	open   []string
	ids    map[string]bool
	refs   []string
	levels []int
	cells  []int // of the rows of the table that is open
	text   strings.Builder
}

// check fails where a page is not well formed, or holds what a page may not hold. It returns its
// text.
func check(t *testing.T, page string) string {
	t.Helper()
	if !utf8.ValidString(page) || !strings.HasPrefix(page, "<!DOCTYPE html>\n<html lang=\"en\">") {
		t.Fatalf("begins with %.60q", page)
	}
	d := &document{t: t, ids: map[string]bool{}}
	z := xhtml.NewTokenizer(strings.NewReader(page))
	for z.Next() != xhtml.ErrorToken {
		raw := string(z.Raw()) // Token unescapes in place
		token := z.Token()
		switch token.Type {
		case xhtml.StartTagToken:
			d.start(token, raw)
		case xhtml.EndTagToken:
			if n := len(d.open); n == 0 || d.open[n-1] != token.Data {
				t.Fatalf("</%s> within %v", token.Data, d.open)
			}
			d.end(token.Data)
		case xhtml.TextToken:
			if strings.ContainsAny(raw, "<>") && d.open[len(d.open)-1] != "style" {
				t.Errorf("text that is not escaped: %.80q", raw)
			}
			d.text.WriteString(token.Data)
		case xhtml.SelfClosingTagToken, xhtml.CommentToken:
			t.Errorf("%.80q", raw)
		}
	}
	if len(d.open) > 0 {
		t.Errorf("left open: %v", d.open)
	}
	for _, ref := range d.refs {
		if !d.ids[ref] {
			t.Errorf("nothing has the id %q", ref)
		}
	}
	if slices.Index(d.levels, 1) != 0 || slices.Contains(d.levels[1:], 1) {
		t.Errorf("headings: %v", d.levels)
	}
	for _, must := range []string{"</title>\n<style>", "<main id=\"main\">", "name=\"viewport\"",
		"http-equiv=\"Content-Security-Policy\""} {
		if strings.Count(page, must) != 1 {
			t.Errorf("%d of %s", strings.Count(page, must), must)
		}
	}
	return d.text.String()
}

func (d *document) start(token xhtml.Token, raw string) {
	d.t.Helper()
	may, known := allowed[token.Data]
	if !known {
		d.t.Errorf("an element %.80q", raw)
		return
	}
	if !written.MatchString(raw) {
		d.t.Errorf("written as %.200q", raw)
	}
	seen := map[string]bool{}
	for _, a := range token.Attr {
		if !slices.Contains(strings.Fields(strings.ToLower(may)), a.Key) || seen[a.Key] {
			d.t.Errorf("an attribute %s of %.80q", a.Key, raw)
		}
		seen[a.Key] = true
		switch a.Key {
		case "id":
			if d.ids[a.Val] || a.Val == "" {
				d.t.Errorf("a second id %q", a.Val)
			}
			d.ids[a.Val] = true
		case "href", "action":
			if !where.MatchString(a.Val) {
				d.t.Errorf("it leads to %q", a.Val)
			}
			if id, within := strings.CutPrefix(a.Val, "#"); within {
				d.refs = append(d.refs, id)
			}
		case "aria-labelledby", "for":
			d.refs = append(d.refs, a.Val)
		case "d", "x", "y", "viewbox":
			if strings.Contains(a.Val, "N") || strings.Contains(a.Val, "Inf") {
				d.t.Errorf("no number: %.80q", raw)
			}
		}
	}
	if level, err := strconv.Atoi(strings.TrimPrefix(token.Data, "h")); err == nil {
		if n := len(d.levels); n > 0 && level > d.levels[n-1]+1 {
			d.t.Errorf("h%d after h%d", level, d.levels[n-1])
		}
		d.levels = append(d.levels, level)
	}
	switch token.Data {
	case "table":
		d.cells = nil
	case "tr":
		d.cells = append(d.cells, 0)
	case "th", "td":
		if token.Data == "th" && !seen["scope"] {
			d.t.Errorf("a th without a scope: %s", raw)
		}
		d.cells[len(d.cells)-1]++
	}
	if !slices.Contains(voids, token.Data) {
		d.open = append(d.open, token.Data)
	}
}

func (d *document) end(tag string) {
	d.t.Helper()
	d.open = d.open[:len(d.open)-1]
	if tag == "table" && (len(d.cells) < 2 || slices.Min(d.cells) != slices.Max(d.cells)) {
		d.t.Errorf("a table of rows with %v cells", slices.Compact(d.cells))
	}
}

// TestCheckSees: it is a check that something can fail.
func TestCheckSees(t *testing.T) {
	text := rendered(t, healthy())
	if fails(func(t *testing.T) { check(t, text) }) {
		t.Fatal("a page that is right fails")
	}
	for _, change := range [][2]string{
		{"</h2>", "</h3>"}, {"<p>", "<p onclick=\"x()\">"}, {"</main>", "<script>x()</script></main>"},
		{"<p>", "<p style=\"color: red\">"}, {"<p>", "<p class=red>"}, {"href=\"#services\"", "href=\"//x\""},
		{"id=\"services\"", "id=\"history\""}, {"<h2 ", "<h4 "}, {"</td>", "</td><td></td>"},
		{"<p>", "<p>a > b"}, {"<main ", "<img src=\"x\"><main "}, {"</li>", ""}, {"<h1 ", "<h2 "},
	} {
		changed := strings.Replace(text, change[0], change[1], 1)
		if changed == text {
			t.Fatalf("no %s", change[0])
		}
		// A T of its own: what fails there is what is looked for.
		if !fails(func(t *testing.T) { check(t, changed) }) {
			t.Errorf("%s for %s is taken", change[1], change[0])
		}
	}
}

// fails says whether a test would fail.
func fails(test func(*testing.T)) bool {
	var probe testing.T
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = recover() }() // a T that no runner made cannot log
		test(&probe)
	}()
	<-done
	return probe.Failed()
}

// TestHostile: what others wrote is shown as it is, bounded, and is nothing but text.
func TestHostile(t *testing.T) {
	for name, word := range map[string]string{
		"script":    `</style></title><script>alert("1")</script><!--`,
		"attribute": `" onmouseover="alert(1)" x='`,
		"entity":    `&lt;b&gt; &amp;quot; &#0;`,
		"control":   "a\x00\x1b]0;owned\x07\x1b[2J\r\n\u009b31m\x7f",
		"direction": "abc\u202edcba\u2066\u200b\ufeff",
		"long":      strings.Repeat("<b>名", 300_000),
		"invalid":   "a\xff\xfe\xc3(",
		"url":       "javascript:alert(1)//:80",
		"empty":     "",
	} {
		t.Run(name, func(t *testing.T) {
			page := rendered(t, hostile(word))
			text := check(t, page)
			if len(page) > 1<<20 {
				t.Errorf("%d bytes", len(page))
			}
			for _, c := range page {
				if c != '\n' && (unicode.IsControl(c) || unicode.Is(unicode.Cf, c)) {
					t.Fatalf("it has %q", c)
				}
			}
			if name == "script" && strings.Count(text, `<script>alert("1")</script>`) < 20 {
				t.Error("names are not shown as they are")
			}
			var b strings.Builder
			must(t, RenderQuestion(&b, Question{Time: noon, Host: word, To: word, UID: word, Direction: word,
				Answer: word + "x"}))
			check(t, b.String())
		})
	}
}

// TestMany: ten thousand services are a page that opens, and what is left out is counted.
func TestMany(t *testing.T) {
	page := rendered(t, many(10_000))
	if len(page) > 2<<20 {
		t.Errorf("%d bytes", len(page))
	}
	for _, name := range []string{"svc-00000.", "svc-05555.", "svc-09999."} {
		if !strings.Contains(page, ">"+name+"<wbr>") {
			t.Errorf("no %s", name)
		}
	}
	page = rendered(t, many(12_345))
	if text := check(t, page); !strings.Contains(text, "2,345 services more") {
		t.Error("what is left out is not counted")
	}
}

// TestPolicy: the page's style is the one that its policy allows.
func TestPolicy(t *testing.T) {
	page := rendered(t, healthy())
	if !strings.Contains(page, "<style>"+style+"</style>") {
		t.Error("the style is not as it was hashed")
	}
	if !strings.Contains(page, html.EscapeString(Policy(false))) || strings.Contains(style, "url(") ||
		strings.Contains(style, "@import") || strings.ContainsAny(style, "<&") {
		t.Error(Policy(false))
	}
}

// TestFixed: nothing but a constant is ever written unescaped: no conversion makes one of a string.
func TestFixed(t *testing.T) {
	names, err := filepath.Glob("*.go")
	must(t, err)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		must(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if to, ok := call.Fun.(*ast.Ident); ok && to.Name == "fixed" {
					t.Errorf("%s: a conversion to fixed", name)
				}
			}
			return true
		})
	}
}

// TestContrast: text can be read on what it stands on, 4.5 to 1 as WCAG 2.2 AA asks, in both
// schemes.
func TestContrast(t *testing.T) {
	color := regexp.MustCompile(`--([a-z-]+): #([0-9a-f]{6})`)
	light := map[string]string{}
	for i, part := range strings.SplitAfter(style, ":root {")[1:] {
		colors := maps.Clone(light)
		block, _, _ := strings.Cut(part, "}")
		for _, m := range color.FindAllStringSubmatch(block, -1) {
			colors[m[1]] = m[2]
		}
		if i == 0 {
			light = colors
		}
		for _, on := range []string{"page", "card", "sunk"} {
			for _, text := range []string{"ink", "soft", "link", "good", "warn", "bad", "advice",
				"unknown"} {
				atLeast(t, colors, text, on)
			}
		}
		for _, level := range []string{"good", "warn", "bad", "advice", "unknown"} {
			atLeast(t, colors, "ink", level+"-bg")
			atLeast(t, colors, level, level+"-bg")
		}
		atLeast(t, colors, "card", "link") // a button
	}
}

func atLeast(t *testing.T, colors map[string]string, text, on string) {
	t.Helper()
	a, b := luminance(t, colors[text]), luminance(t, colors[on])
	if contrast := (max(a, b) + 0.05) / (min(a, b) + 0.05); contrast < 4.5 {
		t.Errorf("%s #%s on %s #%s: %.2f", text, colors[text], on, colors[on], contrast)
	}
}

func luminance(t *testing.T, color string) (l float64) {
	t.Helper()
	n, err := strconv.ParseUint(color, 16, 32)
	must(t, err)
	for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
		c := float64(n>>(16-8*i)&255) / 255
		if c <= 0.04045 {
			c /= 12.92
		} else {
			c = math.Pow((c+0.055)/1.055, 2.4)
		}
		l += weight * c
	}
	return l
}
