//go:build shells

// Package completion drives the real shells: somebody types, presses Tab and looks. `make soak
// GROUP=completion` installs them and runs it as root.
package completion

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// A shell begins like this, in a mount namespace with the archive's files where bootstrap puts
// them. What is typed at last is not run: a script of the program's name prints its words instead.
const (
	setUp = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /usr/local
mount -t tmpfs tmpfs /etc/fish/completions
cp -r "$ARCHIVE/root/." /
mkdir /usr/local/bin
cat >/usr/local/bin/service-proxy-agent <<END
#!/bin/sh
case \$1 in __complete*) exec "$AGENT" "\$@" ;; esac
printf 'typed:'
printf ' <%s>' "\$@"
echo ' end'
END
chmod 755 /usr/local/bin/service-proxy-agent
cd "$HOME"
`
	bashRC = "PS1='ready> '\nbind 'set enable-bracketed-paste off'\n" +
		". /usr/share/bash-completion/bash_completion\n"
	zshRC  = "PS1='ready> '\nautoload -Uz compinit\ncompinit -u\n"
	fishRC = "function fish_prompt\necho -n 'ready> '\nend\nset -U fish_greeting\n"
)

var shells = map[string]string{
	"bash": `exec bash --rcfile "$HOME/.bashrc" -i`,
	"zsh":  `exec zsh -i`,
	"fish": `exec fish -i`,
}

func TestShells(t *testing.T) {
	binary, err := mesh.Binary()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("AGENT", binary)
	archive := unpacked(t)
	daemon := services(t)
	for shell, start := range shells {
		for _, tt := range []struct{ keys, want string }{
			// What is run in the end.
			{"doc\t", "<doctor>"},
			{"explain 10.0.0.1\t", "<explain> <10.0.0.1:80>"}, // bash takes : for the end of a word
			{"explain 10.0.0.1:\t", "<explain> <10.0.0.1:80>"},
			{"explain [fd\t", "<explain> <[fd00::1]:80>"},
			{"explain [fd00:\t", "<explain> <[fd00::1]:80>"},
			{"doctor --ignore envoy-dow\t", "<doctor> <--ignore> <envoy-down>"},
			{"doctor --ignore drift,envoy-dow\t", "<doctor> <--ignore> <drift,envoy-down>"},
			{"doctor --fail-on=warn\t", "<doctor> <--fail-on=warning>"},
			{"explain 10.0.0.1:80 --uid nobod\t", "<explain> <10.0.0.1:80> <--uid> <nobody>"},
			{"diff --config ./attrib\t", "<diff> <--config> <./attribute.json>"},
			{"version attrib\t", "<version> <attrib>"}, // no file there
			{"help explai\t", "<help> <explain>"},
			// It is quoted, and none of it is run by the second Tab, which hands it on.
			{"explain [fe80\t \t", "<explain> <[fe80::1%$(>ran)]:80>"},
			// What is shown.
			{"\t\t", "doctor"},
			{"doctor --fail-on \t\t", "advice"},
			{"doctor --ignore envoy-\t\t", "envoy-not-configured"},
			{"explain 10.0.0.\t\t", "10.0.0.2:443"},
			{"bootstrap --r\t\t", "rollback"},
		} {
			t.Run(shell+"/"+tt.keys, func(t *testing.T) {
				if shell == "zsh" { // to which [ is a pattern: nobody can type it without a quote
					tt.keys = strings.Replace(tt.keys, "[", `\[`, 1)
				}
				s := open(t, start, archive, daemon)
				s.until(t, "ready> ")
				s.press(t, "service-proxy-agent "+tt.keys)
				if strings.HasPrefix(tt.want, "<") {
					s.press(t, "\r")
					tt.want = "typed: " + tt.want + " end"
				}
				s.until(t, tt.want)
				if _, err := os.Stat(filepath.Join(s.home, "ran")); err == nil {
					t.Error("what was completed was run")
				}
			})
		}
	}
}

// unpacked is a folder with what deploy/package.sh packs.
func unpacked(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "a.tgz")
	pack := exec.Command("../../deploy/package.sh")
	pack.Env = append(os.Environ(), "VERSION=1.0.0", "ENVOY=none", "ENVOY_ARM64=none", "OUT="+file)
	for _, cmd := range []*exec.Cmd{pack, exec.Command("tar", "-xzf", file, "-C", dir)} {
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
	return filepath.Join(dir, "service-proxy-agent")
}

// services is the folder of the socket of a daemon that has some.
func services(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	socket, err := server.Socket(dir)
	if err != nil {
		t.Fatal(err)
	}
	var newest atomic.Value
	newest.Store(status.Status{Services: []status.Service{
		{Name: "web", Addresses: []string{"10.0.0.1:80", "[fd00::1]:80"}},
		{Name: "$(>ran)", Addresses: []string{"[fe80::1%$(>ran)]:80"}},
		{Name: "db", Addresses: []string{"10.0.0.2:443"}}}})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = socket.Serve(ctx, server.Answers{Status: newest.Load}, nil)
	}()
	t.Cleanup(func() { stop(); <-ended })
	return dir
}

// shell is one that somebody sits before.
type shell struct {
	home string
	keys *os.File
	mu   sync.Mutex
	text strings.Builder
	news chan struct{}
}

func open(t *testing.T, start, archive, daemon string) *shell {
	t.Helper()
	home := t.TempDir()
	for name, text := range map[string]string{".bashrc": bashRC, ".zshrc": zshRC,
		".config/fish/config.fish": fishRC, "attribute.json": "{}"} {
		file := filepath.Join(home, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755),
			os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	master, slave := pty(t)
	cmd := exec.Command("unshare", "-m", "bash", "-c", setUp+start)
	cmd.Env = append(os.Environ(), "HOME="+home, "ZDOTDIR="+home, "ARCHIVE="+archive,
		"RUNTIME_DIRECTORY="+daemon, "TERM=xterm", "LC_ALL=C.UTF-8",
		"PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	s := &shell{home: home, keys: master, news: make(chan struct{}, 1)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buffer := make([]byte, 4096)
		for {
			n, err := master.Read(buffer)
			s.mu.Lock()
			s.text.Write(buffer[:n])
			s.mu.Unlock()
			select {
			case s.news <- struct{}{}:
			default:
			}
			if err != nil { // closed, or the shell has ended
				return
			}
		}
	}()
	t.Cleanup(func() {
		master.Close() // hangs up, also on what a shell has left behind
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		<-ended
	})
	return s
}

func (s *shell) press(t *testing.T, keys string) {
	t.Helper()
	if _, err := s.keys.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

// escapes are what moves the cursor and colours a terminal.
var escapes = regexp.MustCompile("\x1b(\\[[0-9;?>=]*[a-zA-Z]|\\][^\a\x1b]*(\a|\x1b\\\\)|[()][A-Z0-9]|[=>])")

// until waits for a text on the screen.
func (s *shell) until(t *testing.T, want string) {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		s.mu.Lock()
		screen := escapes.ReplaceAllString(s.text.String(), "")
		s.mu.Unlock()
		if strings.Contains(screen, want) {
			return
		}
		select {
		case <-s.news:
		case <-late:
			t.Fatalf("never shown: %q in\n%s\n%q", want, screen, screen)
		}
	}
}

// pty is a new terminal of a usual size.
func pty(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	var failed error
	err = conn.Control(func(fd uintptr) {
		n, failed = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		failed = errors.Join(failed, unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0),
			unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 120}))
	})
	if err = errors.Join(err, failed); err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}
