package terminal

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pty is the end of a new pseudo-terminal of this width that a program writes to.
func pty(t *testing.T, columns uint16) *os.File {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns}); err != nil {
		t.Fatal(err)
	}
	return slave
}

func TestFor(t *testing.T) {
	terminal := pty(t, 80)
	for _, tt := range []struct {
		name, noColour, term string
		w                    io.Writer
		want                 Style
	}{
		{"a terminal", "", "xterm", terminal, true},
		{"without TERM", "", "", terminal, true},
		{"NO_COLOR", "1", "xterm", terminal, false},
		{"NO_COLOR=0 is set, too", "0", "xterm", terminal, false},
		{"dumb", "", "dumb", terminal, false},
		{"a buffer", "", "xterm", &bytes.Buffer{}, false},
		{"a file", "", "xterm", file(t), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("NO_COLOR", tt.noColour)
			t.Setenv("TERM", tt.term)
			if have := For(tt.w); have != tt.want {
				t.Errorf("colour %v, want %v", have, tt.want)
			}
		})
	}
}

func file(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestWidth(t *testing.T) {
	for _, tt := range []struct {
		name, columns string
		w             io.Writer
		want          int
	}{
		{"a pipe", "", file(t), 100},
		{"a terminal", "", pty(t, 72), 72},
		{"a wide terminal", "", pty(t, 250), 100},
		{"a terminal that does not know", "", pty(t, 0), 100},
		{"too narrow for words", "", pty(t, 9), 40},
		{"asked for", "120", pty(t, 72), 120},
		{"asked for in a pipe", "60", file(t), 60},
		{"no number", "wide", pty(t, 72), 72},
		{"negative", "-5", file(t), 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("COLUMNS", tt.columns)
			if have := Width(tt.w); have != tt.want {
				t.Errorf("%d columns, want %d", have, tt.want)
			}
		})
	}
}

func TestStyle(t *testing.T) {
	words := func(s Style) string {
		return s.Good("a") + s.Bad("b") + s.Warn("c") + s.Dim("d") + s.Bold("e") + s.Bad("")
	}
	if have := words(false); have != "abcde" {
		t.Errorf("plain: %q", have)
	}
	want := "\x1b[32ma\x1b[0m\x1b[31mb\x1b[0m\x1b[33mc\x1b[0m\x1b[2md\x1b[0m\x1b[1me\x1b[0m"
	if have := words(true); have != want {
		t.Errorf("in colour: %q", have)
	}
	if have := Style(true).Bold("a\nb"); have != "\x1b[1ma\x1b[0m\n\x1b[1mb\x1b[0m" {
		t.Errorf("two lines: %q", have)
	}
}

func TestWrap(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		indent     int
		want       string
	}{
		{"short", "one two", 2, "one two"},
		{"just fits", "0123456789", 2, "0123456789"},
		{"long", "one two three four five", 2, "one two\n  three\n  four\n  five"},
		{"its own indentation counts", "  one two three", 2, "  one two\n    three"},
		{"inner spaces stay", "a  b one two", 1, "a  b one\n two"},
		{"a word wider than a line", "see 0123456789abcdefghijklm now", 2,
			"see\n  01234567\n  89abcdef\n  ghijklm\n  now"},
		{"such a word first", "  0123456789abc now", 1, "  01234567\n   89abc\n   now"},
		{"no room at all", "            ab cd", 1, "            a\n             b\n             c\n             d"},
		{"lines", "one\ntwo three four\n\nfive\n", 1, "one\ntwo three\n four\n\nfive\n"},
		{"runes, not bytes", "äöü äöü äö", 0, "äöü äöü äö"},
		{"a colour is no column", "\x1b[31mERROR\x1b[0m down x", 2, "\x1b[31mERROR\x1b[0m down\n  x"},
		{"spaces at the end", "one two   \n", 2, "one two   \n"},
		{"a no-break space", "one 2\u00a0h ago", 2, "one 2 h\n  ago"},
		{"one that fits", "one two 3\u00a0h, x", 2, "one two\n  3 h, x"},
		{"one in a short line", "3\u00a0h", 2, "3 h"},
		{"nothing", "", 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if have := Wrap(tt.text, 10, tt.indent); have != tt.want {
				t.Errorf("%q, want %q", have, tt.want)
			}
		})
	}
}

// TestGone: a pipe that nobody reads is told from one that somebody may read, and from a file.
func TestGone(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if Gone(w) || Gone(file) || Gone(&strings.Builder{}) {
		t.Error("somebody reads, or may do so later")
	}
	r.Close()
	if !Gone(w) {
		t.Error("nobody reads")
	}
}
