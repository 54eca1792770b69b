package terminal

import "strings"

// Wrap breaks each line of the text that is wider than width between words. What follows a break is
// indented as its line is, and by indent more. A word that is wider than a line is broken, too, and
// a colour has no width. At NoBreak no line is broken; it is printed as a space.
func Wrap(text string, width, indent int) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		body := strings.TrimSuffix(line, "\n")
		wrapLine(&b, body, width, indent)
		b.WriteString(line[len(body):])
	}
	return strings.ReplaceAll(b.String(), NoBreak, " ")
}

// NoBreak is the no-break space.
const NoBreak = "\u00a0"

func wrapLine(b *strings.Builder, line string, width, indent int) {
	if Columns(line) <= width {
		b.WriteString(line)
		return
	}
	own := spaces(line)
	hang := "\n" + strings.Repeat(" ", own+indent)
	b.WriteString(line[:own])
	at, fresh := own, true // fresh: nothing but the indentation is on this line
	for rest := line[own:]; rest != ""; {
		gap := spaces(rest)
		end := gap + strings.IndexByte(rest[gap:]+" ", ' ')
		word := rest[gap:end]
		if w := Columns(word); at+gap+w <= width {
			b.WriteString(rest[:end])
			at += gap + w
		} else {
			if !fresh {
				b.WriteString(hang)
				at = own + indent
			}
			for at+Columns(word) > width && Columns(word) > 1 {
				first, others := split(word, max(width-at, 1))
				b.WriteString(first + hang)
				word, at = others, own+indent
			}
			b.WriteString(word)
			at += Columns(word)
		}
		rest, fresh = rest[end:], false
	}
}

func spaces(text string) int { return len(text) - len(strings.TrimLeft(text, " ")) }
