package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// narrator sets the text: prose wrapped to the terminal, at most proseWidth columns; what
// commands print as it came.
type narrator struct {
	out    io.Writer
	broken func(error) // told of the first write that fails
	width  int
	colour bool
	blank  bool // the last line was empty
	err    error
}

const (
	proseWidth = 88
	indent     = "   "
)

// newNarrator writes to f. Colour is for terminals only, and not for those who set
// NO_COLOR (no-color.org).
func newNarrator(f *os.File, broken func(error)) *narrator {
	n := &narrator{out: f, broken: broken, width: proseWidth, blank: true}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err == nil {
		n.colour = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
		if size.Col > 0 { // 0: a terminal that does not know
			n.width = min(proseWidth, int(size.Col))
		}
	}
	return n
}

func (n *narrator) line(text string) {
	if n.err != nil {
		return
	}
	n.blank = text == ""
	if _, n.err = fmt.Fprintln(n.out, strings.TrimRight(text, " ")); n.err != nil {
		n.broken(n.err)
	}
}

// gap is one empty line, however often it is asked for.
func (n *narrator) gap() {
	if !n.blank {
		n.line("")
	}
}

const (
	bold  = "1"
	green = "32"
	red   = "1;31"
	dim   = "2"
)

func (n *narrator) in(style, text string) string {
	if !n.colour {
		return text
	}
	return "\x1b[" + style + "m" + text + "\x1b[0m"
}

func (n *narrator) heading(text string) {
	n.gap()
	n.line(n.in(bold, text))
}

// say is prose.
func (n *narrator) say(format string, args ...any) { n.prose("", "", fmt.Sprintf(format, args...)) }

// tell is prose within a step.
func (n *narrator) tell(format string, args ...any) {
	n.prose(indent, indent, fmt.Sprintf(format, args...))
}

// ok is a claim that was checked.
func (n *narrator) ok(format string, args ...any) {
	n.prose(indent+n.in(green, "ok")+"  ", indent+"    ", fmt.Sprintf(format, args...))
}

// failed is one that does not hold.
func (n *narrator) failed(format string, args ...any) {
	n.gap()
	for i, text := range strings.Split(strings.TrimSpace(fmt.Sprintf(format, args...)), "\n") {
		if i == 0 {
			text = n.in(red, "FAILED") + "  " + text
		}
		n.line(text)
	}
	n.gap()
}

// prompt is a command as it would be typed, at the place named by where.
func (n *narrator) prompt(where, command string) {
	n.gap()
	n.line(indent + n.in(dim, where) + " " + n.in(bold, command))
}

// output is what a command printed.
func (n *narrator) output(text string) {
	for text := range strings.Lines(strings.TrimRight(text, "\r\n ")) {
		n.line(indent + strings.TrimRight(text, "\r\n"))
	}
}

func (n *narrator) prose(first, rest, text string) {
	for i, l := range wrap(text, n.width-len(rest)) {
		if i == 0 {
			n.line(first + l)
		} else {
			n.line(rest + l)
		}
	}
}

// wrap breaks text at white space into lines of at most width characters; a longer word
// has a line of its own.
func wrap(text string, width int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len([]rune(line))+1+len([]rune(word)) > width {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
