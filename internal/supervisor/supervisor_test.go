package supervisor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

// newRegion makes what an Envoy of hot restart version 11 has in shared memory, with these flags.
func newRegion(t *testing.T, flags uint64) (base uint32, r region) {
	t.Helper()
	base = 1 + rand.Uint32N(maxBase)
	r = regionOf(base)
	text := binary.NativeEndian.AppendUint64(nil, 104)
	text = binary.NativeEndian.AppendUint64(text, regionVersion)
	text = append(text, bytes.Repeat([]byte{0xaa}, 80)...) // two locks
	text = binary.NativeEndian.AppendUint64(text, flags)
	if err := os.WriteFile(string(r), text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.remove)
	return base, r
}

// TestRegion: the mark is read and taken back, and nothing else is touched. What is no such region
// is left alone.
func TestRegion(t *testing.T) {
	_, r := newRegion(t, initializing)
	before, err := os.ReadFile(string(r))
	if err != nil {
		t.Fatal(err)
	}
	if init, err := r.initializes(); !init || err != nil {
		t.Errorf("initializes: %v, %v", init, err)
	}
	if v, err := r.version(); v != "11.104" || err != nil {
		t.Errorf("version %q, %v", v, err)
	}
	if err := r.clear(); err != nil {
		t.Fatal(err)
	}
	if init, err := r.initializes(); init || err != nil {
		t.Errorf("after it was taken back: %v, %v", init, err)
	}
	if after, err := os.ReadFile(string(r)); err != nil || !bytes.Equal(after[:96], before[:96]) {
		t.Errorf("more was changed: %v, %x", err, after)
	}
	for name, text := range map[string][]byte{
		"another version": slices.Concat(before[:8], []byte{12, 0, 0, 0, 0, 0, 0, 0}, before[16:]),
		"another size":    before[:96],
		"empty":           nil,
	} {
		if err := os.WriteFile(string(r), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := r.clear(); err == nil {
			t.Errorf("%s: taken back", name)
		}
		if v, err := r.version(); err == nil {
			t.Errorf("%s: version %q", name, v)
		}
		if now, _ := os.ReadFile(string(r)); !bytes.Equal(now, text) {
			t.Errorf("%s: changed", name)
		}
	}
}

// request is envoy.HotRestartMessage{request} with one field of no content.
func request(field byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, 4), tagRequest, 2, field<<3|2, 0)
}

// TestStandIn: a child that asks its dead parent is answered, and what is told it is taken; a
// parent's answer to a dead child is taken, too.
func TestStandIn(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "hot")
	const base = 77
	child, err := net.ListenUnixgram("unixgram",
		&net.UnixAddr{Name: socketOf(prefix, "child", base, 4), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	parent := &net.UnixAddr{Name: socketOf(prefix, "parent", base, 3), Net: "unixgram"}
	if parent.Name != prefix+"_parent_770" || child.LocalAddr().String() != prefix+"_child_771" {
		t.Fatalf("sockets %v, %v", parent, child.LocalAddr())
	}
	if err := os.WriteFile(parent.Name, nil, 0o600); err != nil { // the dead one's
		t.Fatal(err)
	}
	if err := standIn(prefix, base, StandIn{Epoch: 3}, time.Minute); err != nil {
		t.Fatal(err)
	}
	answer := func() {
		t.Helper()
		buf := make([]byte, 100)
		_ = child.SetReadDeadline(time.Now().Add(10 * time.Second))
		want := []byte{0, 0, 0, 0, 0, 0, 0, 2, 0x18, 1}
		if n, err := child.Read(buf); err != nil || !bytes.Equal(buf[:n], want) {
			t.Errorf("answer %x, %v", buf[:n], err)
		}
	}
	answer()                                   // the child may have asked the one that has died
	for _, field := range []byte{3, 1, 4, 3} { // statistics, a socket, drain, statistics
		if _, err := child.WriteTo(request(field), parent); err != nil {
			t.Fatal(err)
		}
		if field != 4 {
			answer()
		}
	}
	if _, err := child.WriteTo(request(5), parent); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		if _, err := child.WriteTo(request(3), parent); err != nil {
			break // it has ended
		}
		if time.Since(began) > 10*time.Second {
			t.Fatal("it goes on after the child has told its parent to end")
		}
	}

	if err := standIn(prefix, base, StandIn{Epoch: 5, Parent: true}, time.Minute); err != nil {
		t.Fatal(err)
	}
	at := &net.UnixAddr{Name: socketOf(prefix, "child", base, 5), Net: "unixgram"}
	for range 100 { // more than a queue holds (net.unix.max_dgram_qlen)
		if _, err := child.WriteTo([]byte("an answer"), at); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCheck: what an Envoy that cannot take over says of itself, before anything is touched.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	base, _ := newRegion(t, 0)
	for name, test := range map[string]struct {
		script string
		code   int // -1: it can
		says   string
	}{
		"can": {`case "$1" in --hot-restart-version) printf 11.104;; esac`, -1, ""},
		// Seen in Envoy's unit on a VM with Debian 12; the end of the line was not.
		"can, behind a warning": {`case "$1" in --hot-restart-version)
			echo "[2026-11-30 09:10:45.845][787][warning][misc] [source/server/cgroup_cpu_util.cc:313] Expected" \
				"cgroup v2 file not accessible at /sys/fs/cgroup/cpu.max" >&2
			echo 11.104 >&2;; esac`, -1, ""},
		"another version": {`printf 12.104`, NotPossible, "12.104, and that of the one that runs 11.104"},
		"without":         {`printf disabled`, NotPossible, "disabled"},
		"does not run":    {`exit 127`, NotDone, "does not run"},
		"configuration": {`case "$*" in --hot-restart-version) printf 11.104;; *validate*)
			[ "$1 $2 $3 $4" = "-c x --mode validate" ] && echo first >&2 && echo no such field >&2
			exit 1;; esac`, NotDone, "does not take its configuration: no such field"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+test.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			s := &supervisor{o: Options{Dir: dir, Argv: []string{path, "-c", "x"}, Log: zap.NewNop()},
				bases: map[int]uint32{1: base}}
			refused := s.check(&child{Start: Start{Chain: 1}})
			if test.code < 0 {
				if refused != nil {
					t.Errorf("refused: %v", *refused)
				}
				return
			}
			if refused == nil || refused.Code != test.code || !strings.Contains(refused.Text, test.says) {
				t.Errorf("have %v, want %d with %q", refused, test.code, test.says)
			}
		})
	}
	s := &supervisor{o: Options{Argv: []string{"/bin/true"}}, bases: map[int]uint32{1: base + 1}}
	if r := s.check(&child{Start: Start{Chain: 1}}); r == nil || r.Code != NotPossible {
		t.Errorf("without shared memory: %v", r)
	}
}

// TestReason: what Envoy says of a configuration that it refuses, without what it quotes of that.
func TestReason(t *testing.T) {
	const prefix = "[2026-11-29 15:52:56.369][30849][critical][main] [source/server/config_validation/server.cc:76] "
	for out, want := range map[string]string{
		"":                    "exit status 1",
		"a\nno such option\n": "no such option",
		"[2026-11-29 15:52:56.1][1][info][main] [source/x.cc:1] x\n" + prefix +
			"error initializing configuration 'a.json': Invalid path: /nonexistent\nInvalid path: /nonexistent\n": "error initializing configuration 'a.json': Invalid path: /nonexistent",
	} {
		if have := reason(out, errors.New("exit status 1")); have != want {
			t.Errorf("%q\nwant %q", have, want)
		}
	}
	quoted := "error initializing configuration 'a.json': Unable to parse JSON as proto (INVALID_ARGUMENT): " +
		`node.metadata: "s3cret token=abcdef"`
	if have := reason(prefix+quoted, nil); strings.Contains(have, "s3cret") || strings.Contains(have, "abcdef") {
		t.Errorf("%q", have)
	}
}

// TestLook: an interface that accepts and does not answer may yet be closed.
func TestLook(t *testing.T) {
	file := filepath.Join(t.TempDir(), "admin")
	at := func(address string) Admin {
		t.Helper()
		if err := os.WriteFile(file, []byte(address), 0o600); err != nil {
			t.Fatal(err)
		}
		return look(file)
	}
	if a := look(file); a != AdminAnswers {
		t.Errorf("no interface: %v", a)
	}
	said := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/listeners" {
			fmt.Fprint(w, said)
		}
	}))
	address := server.Listener.Addr().String()
	if a := at(address); a != AdminAnswers {
		t.Errorf("one that answers: %v", a)
	}
	if listens(file) {
		t.Error("one without listeners has some")
	}
	if said = "outbound::0.0.0.0:15001\n"; !listens(file) {
		t.Error("one with a listener has none")
	}
	server.Close()
	if !listens(file) {
		t.Error("one that does not answer has no listeners")
	}
	if a := at(address); a != AdminGone {
		t.Errorf("one that is closed: %v", a)
	}
	silent, err := net.Listen("unix", file+".sock")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if a := at(file + ".sock"); a != AdminUnknown {
		t.Errorf("one that is silent: %v", a)
	}
}

// TestArguments that the supervisor reads, and gives.
func TestArguments(t *testing.T) {
	argv := []string{"envoy", "-c", "a.json", "-l", "info", "--parent-shutdown-time-s", "15"}
	if c := configOf(argv); c != "a.json" {
		t.Errorf("configuration %q", c)
	}
	if now := withConfig(argv, "b.json"); now[2] != "b.json" || argv[2] != "a.json" {
		t.Errorf("%q, of %q", now, argv)
	}
	if now := withConfig([]string{"envoy", "-c"}, "b.json"); len(now) != 2 {
		t.Errorf("%q", now)
	}
	if d, err := seconds(argv, "--parent-shutdown-time-s", time.Hour); d != 15*time.Second || err != nil {
		t.Errorf("%v, %v", d, err)
	}
	if d, err := seconds(argv[:5], "--parent-shutdown-time-s", time.Hour); d != time.Hour || err != nil {
		t.Errorf("%v, %v", d, err)
	}
	if _, err := seconds([]string{"envoy", "--x", "1s"}, "--x", 0); err == nil {
		t.Error("1s is no number of seconds")
	}
	for config, want := range map[string]string{
		`{"dynamic_resources":{"lds_config":{"ads":{}},"cds_config":{"ads":{}}}}`: `--config-yaml ` +
			`{"dynamic_resources":{"cds_config":{"initial_fetch_timeout":"0s"},"lds_config":{"initial_fetch_timeout":"0s"}}}`,
		`{"dynamic_resources":{"lds_config":{"ads":{}}}}`: `--config-yaml ` +
			`{"dynamic_resources":{"lds_config":{"initial_fetch_timeout":"0s"}}}`,
		`{"static_resources":{}}`: "",
		"dynamic_resources: {}":   "",
		"":                        "",
	} {
		if have := strings.Join(patience(argv, []byte(config)), " "); have != want {
			t.Errorf("%s: %s\nwant %s", config, have, want)
		}
	}
	if have := patience([]string{"envoy", "--config-yaml", "{}"},
		[]byte(`{"dynamic_resources":{"lds_config":{}}}`)); have != nil {
		t.Errorf("beside the administrator's own: %q", have)
	}
}

// TestReload asks by the socket what a supervisor is asked, and has no answer without one.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	l, err := listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, controlName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode: %v, %v", info.Mode(), err)
	}
	all := orders{open: map[int]net.Conn{}}
	asked := make(chan net.Conn)
	go serve(l, func(conn net.Conn) { asked <- conn })
	go func() {
		for conn := range asked {
			n := all.take(conn)
			all.reply(Reply{[]int{n, 99}, Answer{n, fmt.Sprintf("order\n%d", n)}})
		}
	}()
	for n := 1; n < 3; n++ {
		a, err := Reload(t.Context(), dir)
		if want := (Answer{n, fmt.Sprint("order ", n)}); a != want || err != nil {
			t.Errorf("%v, %v; want %v", a, err, want)
		}
	}
	conn, err := net.Dial("unix", filepath.Join(dir, controlName))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(conn, "nonsense")
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("nonsense is answered by %d bytes", n)
	}
	l.Close()
	if a, err := Reload(t.Context(), dir); err == nil {
		t.Errorf("without a supervisor: %v", a)
	}
}
