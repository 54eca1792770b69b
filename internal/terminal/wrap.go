package terminal

import (
	"strings"
	"unicode/utf8"
)

// Wrap breaks each line of the text that is wider than width between words. What follows a break is
// indented as its line is, and by indent more. A word is never broken, and counts without its
// colour.
func Wrap(text string, width, indent int) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		body, end := line, ""
		if strings.HasSuffix(line, "\n") {
			body, end = line[:len(line)-1], "\n"
		}
		wrapLine(&b, body, width, indent)
		b.WriteString(end)
	}
	return b.String()
}

func wrapLine(b *strings.Builder, line string, width, indent int) {
	if columns(line) <= width {
		b.WriteString(line)
		return
	}
	own := len(line) - len(strings.TrimLeft(line, " "))
	hang := "\n" + strings.Repeat(" ", own+indent)
	b.WriteString(line[:own])
	at, fresh := own, true // fresh: nothing but the indentation is on this line
	for rest := line[own:]; rest != ""; {
		spaces := len(rest) - len(strings.TrimLeft(rest, " "))
		word, after := rest[spaces:], ""
		if end := strings.IndexByte(word, ' '); end >= 0 {
			word, after = word[:end], word[end:]
		}
		if w := columns(word); fresh || at+spaces+w <= width {
			b.WriteString(rest[:spaces] + word)
			at += spaces + w
		} else {
			b.WriteString(hang + word)
			at = own + indent + w
		}
		rest, fresh = after, false
	}
}

// columns is how wide a text is: a rune is one column, and a colour none.
func columns(text string) (n int) {
	for text != "" {
		if strings.HasPrefix(text, "\x1b[") {
			if end := strings.IndexByte(text, 'm'); end > 0 {
				text = text[end+1:]
				continue
			}
		}
		_, size := utf8.DecodeRuneInString(text)
		text = text[size:]
		n++
	}
	return n
}
