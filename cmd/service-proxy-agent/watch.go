package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// watchEvery is how often `status --watch` looks.
const watchEvery = time.Second

// watcher looks at the daemon's status again and again.
type watcher struct {
	tell   teller
	errors io.Writer // where it is said that nobody answers, in JSON
	ask    func(context.Context) (body []byte, s status.Status, err error)
	window func() (rows int, isTerminal bool)
	// resized tells that the window has another size, suspended of Ctrl-Z, and continued of `fg`.
	resized, suspended, continued <-chan os.Signal
	// suspend stops this process until it is continued.
	suspend func() error
}

func newWatcher(tell teller, errors io.Writer) watcher {
	w := watcher{tell: tell, errors: errors, ask: askStatus, window: func() (int, bool) {
		_, rows, isTerminal := terminal.Window(tell.out)
		return rows, isTerminal && !tell.json
	}}
	if _, isTerminal := w.window(); isTerminal {
		w.resized, w.suspended = signals(unix.SIGWINCH), signals(unix.SIGTSTP)
		w.continued = signals(unix.SIGCONT)
		// Not SIGTSTP again: that is ours now.
		w.suspend = func() error { return unix.Kill(unix.Getpid(), unix.SIGSTOP) }
	}
	return w
}

func signals(which os.Signal) <-chan os.Signal {
	c := make(chan os.Signal, 1)
	signal.Notify(c, which)
	return c
}

// look is an answer, or that there was none.
type look struct {
	body []byte
	s    status.Status
	err  error
}

// code is the exit code of a look.
func (l look) code() error {
	if l.err != nil {
		return &exitError{code: exitcode.NotKnown}
	}
	return verdict(l.s)
}

// same says that a person, or a program, has been told of it already.
func (l look) same(before look) bool {
	if l.err != nil || before.err != nil {
		return l.err != nil && before.err != nil && l.err.Error() == before.err.Error()
	}
	return reflect.DeepEqual(l.s.Steady(), before.s.Steady())
}

// run looks until ctx ends. Its error is that of the last look: by then all was said.
func (w watcher) run(ctx context.Context) error {
	_, isTerminal := w.window()
	if isTerminal {
		fmt.Fprint(w.tell.out, toDraw)
		defer fmt.Fprint(w.tell.out, toType)
	}
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	last, known := look{err: errors.New("not asked yet")}, status.Status{}
	for first := true; ; first = false {
		var now look
		now.body, now.s, now.err = w.ask(ctx)
		if ctx.Err() != nil { // it may be cut short
			return last.code()
		}
		if now.err == nil {
			known = now.s
		}
		if terminal.Gone(w.tell.out) { // as `| head -1` goes, and nothing changes for a day
			return &exitError{code: exitcode.NotKnown} // nobody is left to be told
		}
		var err error
		switch {
		case isTerminal:
			err = w.draw(now, known, first)
		case first || !now.same(last):
			err = w.print(now)
		}
		if err != nil {
			return unwritten(err)
		}
		last = now
		for waiting := true; waiting; {
			var err error
			select {
			case <-ctx.Done():
				return last.code()
			case <-ticker.C:
				waiting = false
			case <-w.resized:
				err = w.draw(last, known, true)
			case <-w.suspended: // the shell is to find its terminal as it left it
				fmt.Fprint(w.tell.out, toType)
				err = w.suspend()
			case <-w.continued:
				fmt.Fprint(w.tell.out, toDraw)
				err = w.draw(last, known, true)
			}
			if err != nil {
				return unwritten(err)
			}
		}
	}
}

const (
	// No cursor that jumps about, and no line that goes on in the next.
	toDraw = "\x1b[?25l\x1b[?7l"
	// As a shell has it.
	toType = "\x1b[?7h\x1b[?25h"
)

// print tells of a change where nobody can draw: a text with an empty line behind it, or a line of
// JSON.
func (w watcher) print(l look) error {
	switch {
	case l.err != nil && w.tell.json:
		_, err := fmt.Fprintf(w.errors, "service-proxy-agent: %v\n", noAnswer(l.err))
		return err
	case l.err != nil:
		_, err := fmt.Fprintf(w.tell.out, "%s %v\n\n", time.Now().UTC().Format(time.RFC3339),
			noAnswer(l.err))
		return err
	case w.tell.json:
		var line bytes.Buffer
		if err := json.Compact(&line, l.body); err != nil {
			return err
		}
		line.WriteByte('\n')
		_, err := w.tell.out.Write(line.Bytes())
		return err
	}
	if err := w.tell.status(nil, l.s); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w.tell.out)
	return err
}

// draw writes over what was drawn before, line by line, so that nothing flickers. What does not fit
// into the window is left out: the verdict is at the top. known is what was answered last.
func (w watcher) draw(l look, known status.Status, clear bool) error {
	o := w.tell.options(known)
	var text bytes.Buffer
	if l.err != nil {
		said := o.Style.Bad("No") + strings.TrimPrefix(noAnswer(l.err).Error(), "no")
		text.WriteString(terminal.Wrap(said, o.Width, 2) + "\n")
		if known.Version != "" {
			text.WriteString("\nwhat it said last:\n")
		}
	}
	if l.err == nil || known.Version != "" {
		if err := known.Text(&text, o); err != nil {
			return err
		}
	}
	lines := strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n")
	rows, _ := w.window()
	var frame bytes.Buffer
	if clear {
		frame.WriteString("\x1b[2J")
	}
	frame.WriteString("\x1b[H")
	for i, line := range fitting(lines, rows) {
		if i > 0 {
			frame.WriteByte('\n')
		}
		// Not behind the line: the cursor stands on the last letter of one that fills its row.
		frame.WriteString("\x1b[K" + line)
	}
	if rows != 1 { // there the line feed would scroll the line away
		frame.WriteString("\n\x1b[J")
	}
	_, err := w.tell.out.Write(frame.Bytes())
	return err
}

// fitting are the lines for a window with so many rows, of which the cursor has the last one: the
// first of them, and how many more there are. 0: it is not known how many there are.
func fitting(lines []string, rows int) []string {
	switch {
	case rows == 0 || len(lines) < rows:
		return lines
	case rows < 4: // the verdict says more
		return lines[:max(rows-1, 1)]
	}
	return append(lines[:rows-2], fmt.Sprintf("… %d more lines: `service-proxy-agent status` has all",
		len(lines)-(rows-2)))
}
