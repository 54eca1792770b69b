package page

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the style
	"encoding/base64"
	"fmt"
	"html"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// A page is a tree of elements. Whatever a string says becomes text: bounded, printable, escaped.
// Only names of elements and attributes, and the style, are written as they are, and these are
// constants: they have the type fixed, to which nothing is ever converted (TestFixed).

// fixed is a constant of this package.
type fixed string

// attr is an attribute. Its value is escaped, too.
type attr struct {
	name  fixed
	value string
}

func class(names fixed) attr  { return attr{"class", string(names)} }
func id(name string) attr     { return attr{"id", name} }
func href(target string) attr { return attr{"href", target} }

// element is an element with its attributes, and texts, elements and lines inside.
type element struct {
	tag    fixed
	attrs  []attr
	inside []any
}

// el makes an element. Attributes may stand anywhere among what is inside; nil and "" are nothing.
func el(tag fixed, inside ...any) element {
	e := element{tag: tag}
	e.add(inside)
	return e
}

func (e *element) add(inside []any) {
	for _, one := range inside {
		switch one := one.(type) {
		case nil:
		case attr:
			e.attrs = append(e.attrs, one)
		case several:
			e.add(one)
		default:
			e.inside = append(e.inside, one)
		}
	}
}

// several are things that stand beside one another.
type several []any

// lines are a text whose line breaks and spaces count, within <pre>.
type lines string

// Limits of what is written, in bytes before it is escaped: what others wrote may be a megabyte.
const (
	maxText  = 2000
	maxLines = 256 << 10
)

// void elements have nothing inside and no end.
var void = map[fixed]bool{"meta": true, "input": true, "wbr": true}

// apart are elements that begin on a line of their own in the source: so that it can be read, and
// two pages be compared.
var apart = map[fixed]bool{"head": true, "meta": true, "title": true, "style": true, "body": true,
	"header": true, "nav": true, "main": true, "section": true, "article": true, "footer": true,
	"h1": true, "h2": true, "h3": true, "h4": true, "h5": true, "h6": true, "p": true, "ul": true,
	"ol": true, "li": true, "dl": true, "div": true, "dt": true, "dd": true, "table": true, "tr": true,
	"thead": true, "tbody": true, "caption": true, "details": true, "summary": true, "figure": true,
	"figcaption": true, "svg": true, "g": true, "path": true, "rect": true, "text": true, "pre": true,
	"form": true, "symbol": true}

func (e element) write(b *bytes.Buffer) {
	if apart[e.tag] && b.Len() > 0 {
		b.WriteByte('\n')
	}
	b.WriteString("<" + string(e.tag))
	for _, a := range e.attrs {
		if a.name == "required" || a.name == "checked" { // they have no value
			b.WriteString(" " + string(a.name))
			continue
		}
		fmt.Fprintf(b, ` %s="%s"`, a.name, html.EscapeString(printable(a.value)))
	}
	b.WriteByte('>')
	if void[e.tag] {
		return
	}
	if e.tag == "style" {
		b.WriteString(style)
	}
	for _, one := range e.inside {
		switch one := one.(type) {
		case element:
			one.write(b)
		case lines:
			b.WriteString(html.EscapeString(preformatted(string(one))))
		case string:
			b.WriteString(html.EscapeString(printable(one)))
		default:
			b.WriteString(html.EscapeString(printable(fmt.Sprint(one))))
		}
	}
	b.WriteString("</" + string(e.tag) + ">")
}

// printable is symptom.Printable, which takes the spaces at both ends away, with one at each end:
// elements within a sentence need them.
func printable(s string) string {
	out := symptom.Printable(s, maxText)
	if out == "" {
		return " "[:min(len(s), 1)] // nothing but spaces
	}
	if s[0] == ' ' {
		out = " " + out
	}
	if s[len(s)-1] == ' ' {
		out += " "
	}
	return out
}

// preformatted is the same for lines.
func preformatted(s string) string {
	long := len(s) > maxLines
	s = s[:min(len(s), maxLines)]
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n', r == ' ', unicode.IsPrint(r):
			return r
		case r == '\t':
			return ' '
		}
		return utf8.RuneError
	}, s)
	if long {
		s += "\n… and more"
	}
	return s
}

//go:embed style.css
var style string

// Policy is the Content-Security-Policy that a page has, and that who serves it sends as well. Of a
// file nothing can be asked for; a live page may load another live page.
func Policy(live bool) string {
	sum := sha256.Sum256([]byte(style))
	form := "'none'"
	if live {
		form = "'self'"
	}
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action " + form
}
