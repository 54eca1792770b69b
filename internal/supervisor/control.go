package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// DefaultDir is the RuntimeDirectory= of Envoy's unit.
const DefaultDir = "/run/service-proxy-envoy"

const (
	controlName = "control.sock"
	maxAnswer   = 4 << 10 // bytes
)

// ErrNoSupervisor is returned where no supervisor runs.
var ErrNoSupervisor = errors.New("no supervisor of Envoy runs here")

// Reload asks the supervisor of a runtime folder for the next epoch, and waits until that serves or
// has failed. An error says that there is no answer.
func Reload(ctx context.Context, dir string) (Answer, error) {
	conn, err := dial(ctx, filepath.Join(dir, controlName))
	if err != nil {
		return Answer{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err = fmt.Fprintln(conn, "reload"); err != nil {
		return Answer{}, fmt.Errorf("ask Envoy's supervisor: %w", err)
	}
	// The folder is of Envoy's user, and root may ask: who answers may be anybody.
	line, err := bufio.NewReader(io.LimitReader(conn, maxAnswer)).ReadString('\n')
	if ctx.Err() != nil {
		return Answer{}, fmt.Errorf("ask Envoy's supervisor: no answer yet: %w", ctx.Err())
	}
	if err != nil {
		return Answer{}, fmt.Errorf("ask Envoy's supervisor: it has ended without an answer: %w", err)
	}
	code, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	n, err := strconv.Atoi(code)
	if err != nil {
		return Answer{}, fmt.Errorf("ask Envoy's supervisor: it says %q", line)
	}
	return Answer{n, strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)}, nil
}

// dial waits a little for a supervisor that has just been started.
func dial(ctx context.Context, path string) (net.Conn, error) {
	for try := 0; ; try++ {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		away := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
		if !away {
			return nil, fmt.Errorf("ask Envoy's supervisor: %w", err)
		}
		if try == 20 {
			return nil, fmt.Errorf("%w: %w", ErrNoSupervisor, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrNoSupervisor, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// orders are whoever waits for an Answer.
type orders struct {
	last int
	open map[int]net.Conn
}

func (o *orders) take(conn net.Conn) int {
	o.last++
	o.open[o.last] = conn
	return o.last
}

func (o *orders) reply(r Reply) {
	for _, n := range r.Orders {
		if conn := o.open[n]; conn != nil { // nil: a signal asked
			_ = conn.SetDeadline(time.Now().Add(time.Second)) // who asked may have gone
			fmt.Fprintf(conn, "%d %s\n", r.Code, oneLine(r.Text))
			conn.Close()
		}
		delete(o.open, n)
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// alone is an error where a supervisor runs with this folder: a second one would take away what the
// first one's epochs talk by, and the one that serves ends ten seconds after.
func alone(dir string) error {
	conn, err := net.DialTimeout("unix", filepath.Join(dir, controlName), time.Second)
	if err != nil {
		return nil //nolint:nilerr // what else may be wrong, listen tells
	}
	conn.Close()
	return fmt.Errorf("a supervisor of Envoy runs already with %s; ask that one by --reload", dir)
}

// listen opens the socket, which is its owner's and root's alone.
func listen(dir string) (net.Listener, error) {
	path := filepath.Join(dir, controlName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	was := syscall.Umask(0o177)
	defer syscall.Umask(was)
	return net.Listen("unix", path)
}

// serve hands over each connection that has asked for a reload.
func serve(l net.Listener, asked func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // out of descriptors, for one
			continue
		}
		go func() {
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil || strings.TrimSpace(line) != "reload" {
				conn.Close()
				return
			}
			_ = conn.SetDeadline(time.Time{})
			asked(conn)
		}()
	}
}
