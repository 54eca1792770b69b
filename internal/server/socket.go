package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
)

const (
	socketName = "agent.sock"
	lockName   = "agent.lock"
	statusTime = 5 * time.Second  // that Get waits for an answer
	pauseTime  = 30 * time.Second // that Post waits: a pass that is writing must end first
	maxAnswer  = 16 << 20         // bytes
)

// Dir is the folder of the socket: $RUNTIME_DIRECTORY as systemd sets it, else
// /run/service-proxy-agent.
func Dir() string {
	// Of several folders systemd joins with colons the first is meant.
	if dir, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); dir != "" {
		return dir
	}
	return "/run/service-proxy-agent"
}

// HeldError says that another agent holds the socket.
type HeldError struct {
	Path string
	PID  int // 0: not known, the other is only just starting or about to end
	UID  int
}

func (e *HeldError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("hold %s: another agent is starting or stopping; try again", e.Path)
	}
	return fmt.Sprintf(
		"hold %s: another agent runs as process %d of uid %d; stop it first (`systemctl stop "+
			"service-proxy-agent`)", e.Path, e.PID, e.UID)
}

// Local is the socket, held. Make it with [Socket].
type Local struct {
	listener *net.UnixListener
	lock     *os.File
}

// Socket makes this process the one agent of the machine: it takes the lock in dir, which it makes
// if it is missing, replaces a stale agent.sock and listens on a new one, of mode 0600. If another
// agent holds it the error is a *[HeldError].
//
// The lock, and not the socket, decides, since between finding a socket dead and replacing it
// another could do the same. The kernel gives it up when the process ends, however it ends. The
// lock file stays; to remove it would break that.
func Socket(dir string) (*Local, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf(
			"make the socket's folder: %w; run as root, or set RUNTIME_DIRECTORY to a folder of yours", err)
	}
	path := filepath.Join(dir, socketName)
	lock, err := os.OpenFile(filepath.Join(dir, lockName),
		os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf(
			"open lock: %w; run as root, or set RUNTIME_DIRECTORY to a folder of yours", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, heldBy(path)
		}
		return nil, fmt.Errorf("lock %q: %w", lock.Name(), err)
	}
	l, err := listenUnix(path)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &Local{l, lock}, nil
}

func listenUnix(path string) (*net.UnixListener, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("listen on %q: something that is no socket has this name; remove it", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("replace stale socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", path, err)
	}
	// Until here the mode is the umask's; [rootOnly] asks each caller's uid anyway.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// heldBy asks the kernel who listens on the socket.
func heldBy(path string) *HeldError {
	held := &HeldError{Path: path}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return held
	}
	defer c.Close()
	if peer, err := sockdiag.PeerOfUnix(c); err == nil {
		held.PID, held.UID = peer.PID, int(peer.UID)
	}
	return held
}

// Close gives the socket up without having served.
func (l *Local) Close() error {
	// In this order: the next agent must not find its own socket removed.
	err := l.listener.Close()
	return errors.Join(err, l.lock.Close())
}

// Answers are what the socket tells and does.
type Answers struct {
	Status func() any                      // encoded as JSON
	Pause  func(ctx context.Context) error // returns when the loop will write no more
}

// Serve answers GET /status, POST /pause and GET /debug/pprof/… until ctx ends, gives the socket up
// and returns nil then. Only root and the uid of this process are answered. A nil log is silent.
func (l *Local) Serve(ctx context.Context, a Answers, log *zap.Logger) error {
	defer l.Close()
	if log == nil {
		log = zap.NewNop()
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		body, err := json.MarshalIndent(a.Status(), "", "  ")
		if err != nil {
			http.Error(w, "encode status: "+err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(body, '\n'))
	})
	mux.HandleFunc("POST /pause", func(w http.ResponseWriter, r *http.Request) {
		if err := a.Pause(r.Context()); err != nil {
			http.Error(w, guestattr.OneLine(err.Error(), 1024), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "paused")
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	s := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerLimit,
		ReadTimeout:       readLimit,
		WriteTimeout:      2 * time.Minute, // profiles take as many seconds as asked for
		IdleTimeout:       readLimit,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          quiet(log),
	}
	return serve(ctx, s, newLimiter(rootOnly{l.listener}))
}

// rootOnly closes connections of other users. The socket's mode keeps them out, too, except
// while it is being made.
type rootOnly struct{ net.Listener }

func (l rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if peer, err := sockdiag.PeerOfUnix(c); err == nil &&
			(peer.UID == 0 || int(peer.UID) == os.Geteuid()) {
			return c, nil
		}
		c.Close()
	}
}

// Why there is no answer of an agent.
var (
	ErrNoAgent = errors.New("no agent runs")     // nothing listens on the socket
	ErrSilent  = errors.New("no answer in time") // somebody does
)

// StatusError is an answer of the agent other than 200.
type StatusError struct {
	Code int
	Text string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the agent answers %d: %s", e.Code, e.Text)
}

// Client asks a running agent. Make it with [Dial].
type Client struct {
	path string
	http *http.Client
}

// Dial returns a client for the agent whose socket is in dir. It connects with each request only.
//
//	body, err := server.Dial(server.Dir()).Get(ctx, "/status")
//	if errors.Is(err, server.ErrNoAgent) { … }
func Dial(dir string) *Client {
	path := filepath.Join(dir, socketName)
	return &Client{path, &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: statusTime}).DialContext(ctx, "unix", path)
		},
	}}}
}

// Get asks for path and returns the body of the answer. It waits five seconds at most; the error is
// [ErrNoAgent], a *[StatusError], or says why there was no answer.
func (c *Client) Get(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodGet, path, statusTime)
}

// Post has the agent do what path names, for which it waits 30 seconds at most.
// Errors are as with Get.
func (c *Client) Post(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodPost, path, pauseTime)
}

func (c *Client) do(ctx context.Context, method, path string, limit time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := c.http.Do(req)
	// An agent that is killed while it forks leaves a child that holds the socket until its
	// exec, some 30 ms (seen).
	for range 10 {
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
			break
		}
		time.Sleep(20 * time.Millisecond)
		res, err = c.http.Do(req)
	}
	if err != nil {
		return nil, c.explain(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, c.explain(err)
	case len(body) > maxAnswer:
		return nil, fmt.Errorf("read answer from %s: more than %d bytes", c.path, maxAnswer)
	case res.StatusCode != http.StatusOK:
		return nil, &StatusError{res.StatusCode, guestattr.OneLine(string(body), 1024)}
	}
	return body, nil
}

func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nothing listens on %s", ErrNoAgent, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("connect to %s: %w; run as root", c.path, fs.ErrPermission)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("ask agent on %s: %w", c.path, ErrSilent)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // the URL is made up
	}
	return fmt.Errorf("ask agent on %s: %w", c.path, err)
}
