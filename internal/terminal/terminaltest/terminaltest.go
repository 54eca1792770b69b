// Package terminaltest checks what an answer to a person looks like on a terminal.
package terminaltest

import (
	"bytes"
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

var colour = regexp.MustCompile("\x1b\\[[0-9]+m")

// Fits checks that no line of the text is wider than asked for, but for commands to be pasted, and
// that it has the same words in colour.
func Fits(t *testing.T, text func(out io.Writer, style terminal.Style, width int) error) {
	t.Helper()
	for _, width := range []int{100, 60} {
		var plain, coloured bytes.Buffer
		if err := text(&plain, false, width); err != nil {
			t.Fatal(err)
		}
		if err := text(&coloured, true, width); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(plain.String()) {
			line = strings.TrimSuffix(line, "\n")
			if n := terminal.Columns(line); n > width && !command.MatchString(line) {
				t.Errorf("%d columns where %d were asked for:\n%s", n, width, line)
			}
			if colour.MatchString(line) {
				t.Errorf("a colour in plain text: %q", line)
			}
		}
		if without := colour.ReplaceAllString(coloured.String(), ""); without != plain.String() {
			t.Errorf("in colour it is another text:\n%s\nplain:\n%s", without, plain.String())
		}
		for line := range strings.Lines(coloured.String()) {
			if on := strings.Count(line, "\x1b["); on != 2*strings.Count(line, "\x1b[0m") {
				t.Errorf("a colour goes on after the end of its line: %q", line)
			}
		}
	}
}

// command is a line that is to be pasted: doctor's, or an example.
var command = regexp.MustCompile(`^ +(run {5}|(sudo )?service-proxy-agent )`)
