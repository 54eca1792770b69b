// Package terminal says how an answer to a person is to look: whether in colour, and how wide. What
// makes the answer is pure and takes both as values.
package terminal

import (
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Style is whether words get a colour. The zero value is plain.
type Style bool

// For is the style of what is written to w: in colour on a terminal that knows it, unless NO_COLOR
// is set to anything (https://no-color.org).
func For(w io.Writer) Style {
	_, _, isTerminal := Window(w)
	return Style(isTerminal && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb")
}

// Good, Bad and Warn are words that judge, Dim is what matters less, Bold what matters most. The
// colours are of the eight that every terminal has, by the names of which its owner chose the
// tones.
func (s Style) Good(text string) string { return s.sgr("32", text) }
func (s Style) Bad(text string) string  { return s.sgr("31", text) }
func (s Style) Warn(text string) string { return s.sgr("33", text) }
func (s Style) Dim(text string) string  { return s.sgr("2", text) }
func (s Style) Bold(text string) string { return s.sgr("1", text) }

func (s Style) sgr(code, text string) string {
	if !bool(s) || text == "" {
		return text
	}
	// Each line for itself, so that what shows a part of a text (less, grep) shows it right.
	return "\x1b[" + code + "m" +
		strings.ReplaceAll(text, "\n", "\x1b[0m\n\x1b["+code+"m") + "\x1b[0m"
}

// widest is the width where nobody asks for another: longer lines are hard to read.
const widest, narrowest = 100, 40

// Width is how many columns to fill: COLUMNS, else those of the terminal, at most 100, else 100.
func Width(w io.Writer) int {
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		return max(n, narrowest)
	}
	if columns, _, isTerminal := Window(w); isTerminal && columns > 0 {
		return max(min(columns, widest), narrowest)
	}
	return widest
}

// Window is the size of the terminal that w writes to, 0 where it does not know.
func Window(w io.Writer) (columns, rows int, isTerminal bool) {
	f, ok := w.(*os.File)
	if !ok {
		return 0, 0, false
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	var got *unix.Winsize
	ask := func(fd uintptr) { got, err = unix.IoctlGetWinsize(int(fd), unix.TIOCGWINSZ) }
	if conn.Control(ask) != nil || err != nil {
		return 0, 0, false
	}
	return int(got.Col), int(got.Row), true
}

// Gone says whether nobody reads any longer what is written to w: a pipe's other end is closed. Who
// writes finds out by that, and who has nothing to write never does.
func Gone(w io.Writer) (gone bool) {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return false
	}
	_ = conn.Control(func(fd uintptr) { // where it cannot be told, somebody does
		asked := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(asked, 0)
		gone = err == nil && n > 0 && asked[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
	})
	return gone
}
