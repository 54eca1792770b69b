package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
)

// TestTrust: Envoy's admin socket counts as the proxy's user's, or root's, and as nobody else's,
// whether it is a Unix socket or a port. The listener is a process of its own, and another user's
// where the test is root's.
func TestTrust(t *testing.T) {
	if path := os.Getenv("TRUST_LISTENER"); path != "" {
		unixSocket, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		port, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer unixSocket.Close()
		go func() { // in Envoy's words
			_ = http.Serve(port, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprint(w, `{"version": "`+os.Getenv("TRUST_VERSION")+`", "state": "LIVE"}`)
			}))
		}()
		fmt.Println("at", port.Addr())
		_, _ = bufio.NewReader(os.Stdin).ReadByte() // until the other ends
		return
	}
	dir, err := os.MkdirTemp("", "trust") // of a short name, which a Unix socket's path needs
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	uid := os.Getuid()
	path := filepath.Join(dir, "s")
	listener := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTrust$")
	listener.Env = append(os.Environ(), "TRUST_LISTENER="+path,
		"TRUST_VERSION=0123abc/1.40.0/Clean/RELEASE/BoringSSL")
	if uid == 0 {
		uid = 4711
		listener.Path = filepath.Join(dir, "listener") // go test's own folder is root's
		text, err := os.ReadFile(os.Args[0])
		err = errors.Join(err, os.WriteFile(listener.Path, text, 0o755), os.Chmod(dir, 0o777))
		if err != nil {
			t.Fatal(err)
		}
		listener.SysProcAttr = &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)},
		}
		listener.Dir = dir
	}
	in, err := listener.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := listener.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = listener.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	_, at, ok := strings.Cut(strings.TrimSpace(line), "at ")
	if !ok {
		t.Fatalf("the listener says %q, %v", line, err)
	}
	for network, addr := range map[string]string{"unix": path, "tcp": at} {
		for user, trusted := range map[string]bool{
			fmt.Sprint(uid): true, fmt.Sprint(uid + 1): false, "no-such-user": false,
		} {
			c, err := net.Dial(network, addr)
			if err != nil {
				t.Fatal(err)
			}
			var root atomic.Bool
			root.Store(true)
			err = trust(user, &root)(c)
			if trusted && root.Load() {
				t.Errorf("%s of %d is root's", network, uid)
			}
			foreign, isForeign := errors.AsType[*sockdiag.ForeignError](err)
			if trusted && err != nil || !trusted && (!isForeign || foreign.UID != uint32(uid)) {
				t.Errorf("%s of %d, for user %s: %v", network, uid, user, err)
			}
			if isForeign && (network == "tcp") != (foreign.Addr.String() == at) {
				t.Errorf("%s: it is said to be at %v", network, foreign.Addr)
			}
			c.Close()
		}
	}
	foreign := &sockdiag.ForeignError{UID: uint32(uid)}
	for _, tt := range []struct {
		name  string
		admin string
		err   error
		want  bool
	}{
		{"an Envoy", at, fmt.Errorf("get: %w: %w", envoyadmin.ErrUntrusted, foreign), true},
		{"by now another user's", at, &sockdiag.ForeignError{UID: uint32(uid) + 1}, false},
		{"nobody's", at, envoyadmin.ErrTimeout, false},
		{"it answers nothing", "unix://" + path, foreign, false},
		{"nowhere", "nowhere", foreign, false},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if is := answersAsEnvoy(tt.admin)(ctx, tt.err); is != tt.want {
			t.Errorf("%s: %v", tt.name, is)
		}
		cancel()
	}
}
