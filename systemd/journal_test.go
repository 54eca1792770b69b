package systemd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// journald is its two sockets: that of entries, and the stream that is a unit's stderr. (Both are
// plain Unix sockets; see systemd.io/JOURNAL_NATIVE_PROTOCOL.)
type journald struct {
	t       *testing.T
	path    string
	entries *net.UnixConn
	stderr  [2]int // ours, and the program's
	log     *zap.Logger
}

func newJournald(t *testing.T) *journald {
	t.Helper()
	d := &journald{t: t, path: filepath.Join(t.TempDir(), "socket")}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d.stderr = pair
	t.Cleanup(func() { unix.Close(pair[0]); unix.Close(pair[1]); d.stop() })
	j, err := newJournal(zapcore.InfoLevel, "prog", func(id string, over bool) string {
		return fmt.Sprintf("%s-%v", id, over)
	}, d.path, pair[1])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(j.out.fd) })
	d.log = zap.New(j)
	d.start()
	return d
}

func (d *journald) start() {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: d.path, Net: "unixgram"})
	if err != nil {
		d.t.Fatal(err)
	}
	d.entries = conn
}

func (d *journald) stop() {
	d.entries.Close()
	os.Remove(d.path)
}

// read returns the entries that wait, in order.
func (d *journald) read() (all []map[string]string) {
	d.t.Helper()
	raw, err := d.entries.SyscallConn()
	if err != nil {
		d.t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for {
		var n int
		var readErr error
		// A datagram is in the receiver's queue when sendmsg returns: there is nothing to wait for.
		if err := raw.Control(func(fd uintptr) {
			n, _, readErr = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
		}); err != nil {
			d.t.Fatal(err)
		}
		if errors.Is(readErr, unix.EAGAIN) {
			return all
		}
		if readErr != nil {
			d.t.Fatal(readErr)
		}
		all = append(all, d.parse(string(buf[:n])))
	}
}

// parse reads an entry as journald does.
func (d *journald) parse(text string) map[string]string {
	d.t.Helper()
	entry := map[string]string{}
	for text != "" {
		line, rest, ok := strings.Cut(text, "\n")
		name, value, plain := strings.Cut(line, "=")
		if ok && !plain {
			size := binary.LittleEndian.Uint64([]byte(rest[:8]))
			value, rest = rest[8:8+size], rest[8+size+1:]
		}
		if _, twice := entry[name]; !ok || twice || len(name) > 64 ||
			!regexp.MustCompile(`^[A-Z0-9][A-Z0-9_]*$`).MatchString(name) {
			d.t.Fatalf("no entry: %q, at %q", text, name)
		}
		entry[name], text = value, rest
	}
	return entry
}

// said is what waits on stderr.
func (d *journald) said() string {
	d.t.Helper()
	var all strings.Builder
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(d.stderr[0], buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			return all.String()
		}
		if err != nil {
			d.t.Fatal(err)
		}
		all.Write(buf[:n])
	}
}

// TestJournalEntry: what becomes of a log line.
func TestJournalEntry(t *testing.T) {
	long := strings.Repeat("ä", 3000)
	finding := []zap.Field{zap.String("id", "envoy-down"), zap.String("key", "k"),
		zap.String("cause", "it is down"), zap.String("next", "look")}
	for _, tt := range []struct {
		name string
		log  func(*zap.Logger)
		want map[string]string // beside the program and its facility
	}{
		{"plain", func(l *zap.Logger) { l.Info("started") },
			map[string]string{"MESSAGE": "started", "PRIORITY": "6"}},
		{"facts", func(l *zap.Logger) {
			l.Warn("rules repaired", zap.String("family", "IPv4"), zap.Int("rules", 3),
				zap.Duration("took", 1500*time.Microsecond), zap.Strings("by", []string{"a b", "c"}), zap.Bool("late", true),
				zap.Error(errors.New("it was late")), zap.Error(nil), zap.String("none", ""), zap.Any("port", map[string]int{"a": 1}),
				zap.Time("at", time.Unix(1, 5).UTC()), zap.Stringer("net", (*net.IPNet)(nil)))
		}, map[string]string{"PRIORITY": "4",
			"MESSAGE":              `rules repaired family=IPv4 rules=3 took=1.5ms by="a b, c" late=true port=map[a:1] at=1970-01-01T00:00:01.000000005Z net=<nil>: it was late`,
			"SERVICE_PROXY_FAMILY": "IPv4", "SERVICE_PROXY_RULES": "3", "SERVICE_PROXY_TOOK": "1.5ms", "SERVICE_PROXY_BY": "a b, c", "SERVICE_PROXY_LATE": "true",
			"SERVICE_PROXY_ERROR": "it was late", "SERVICE_PROXY_NONE": "", "SERVICE_PROXY_PORT": "map[a:1]",
			"SERVICE_PROXY_AT": "1970-01-01T00:00:01.000000005Z", "SERVICE_PROXY_NET": "<nil>"}},
		{"of a logger", func(l *zap.Logger) { l.With(zap.Int("a", 1)).With(zap.Int("b", 2)).Error("x", zap.Int("c", 3)) },
			map[string]string{"MESSAGE": "x a=1 b=2 c=3", "PRIORITY": "3", "SERVICE_PROXY_A": "1", "SERVICE_PROXY_B": "2", "SERVICE_PROXY_C": "3"}},
		{"said by the message", func(l *zap.Logger) {
			l.Info("service web at 10.0.0.1:80 found", zap.String("service", "web"), zap.String("vip", "10.0.0.1:80"), zap.Int("n", 8))
		}, map[string]string{"MESSAGE": "service web at 10.0.0.1:80 found n=8", "PRIORITY": "6",
			"SERVICE_PROXY_SERVICE": "web", "SERVICE_PROXY_VIP": "10.0.0.1:80", "SERVICE_PROXY_N": "8"}},
		{"a failure", func(l *zap.Logger) { l.Error("it is down; look", append(finding, zap.Int("n", 1))...) },
			map[string]string{"MESSAGE": "it is down; look n=1", "PRIORITY": "3", "MESSAGE_ID": "envoy-down-false", "SERVICE_PROXY_ID": "envoy-down",
				"SERVICE_PROXY_KEY": "k", "SERVICE_PROXY_CAUSE": "it is down", "SERVICE_PROXY_NEXT": "look", "SERVICE_PROXY_N": "1"}},
		{"without a next step", func(l *zap.Logger) { l.Error("it is down", finding[0], finding[2]) },
			map[string]string{"MESSAGE": "it is down", "PRIORITY": "3", "MESSAGE_ID": "envoy-down-false", "SERVICE_PROXY_ID": "envoy-down",
				"SERVICE_PROXY_CAUSE": "it is down", "SERVICE_PROXY_NEXT": "none but what the cause says"}},
		{"over", func(l *zap.Logger) { l.Info("over: it is down", finding[:2]...) },
			map[string]string{"MESSAGE": "over: it is down", "PRIORITY": "6", "MESSAGE_ID": "envoy-down-true", "SERVICE_PROXY_ID": "envoy-down", "SERVICE_PROXY_KEY": "k"}},
		{"what would be no name or no line", func(l *zap.Logger) {
			l.Info("two\nlines\x1b[0m \xff", zap.String("_é.x-"+strings.Repeat("y", 80), "a\nb=c\n"), zap.ByteString("raw", []byte("r\xff")))
		}, map[string]string{"MESSAGE": "two lines [0m \ufffd _é.x-" + strings.Repeat("y", 80) + `="a\nb=c\n" raw=r` + "\ufffd", "PRIORITY": "6",
			"SERVICE_PROXY____X_" + strings.Repeat("Y", 45): "a\nb=c\n", "SERVICE_PROXY_RAW": "r\xff"}},
		{"too long", func(l *zap.Logger) { l.Info("x", zap.String("long", long)) },
			map[string]string{"MESSAGE": "x long=" + long[:3990] + "…", "PRIORITY": "6", "SERVICE_PROXY_LONG": long[:3996] + "…"}},
		{"not enabled", func(l *zap.Logger) { l.Debug("x") }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newJournald(t)
			tt.log(d.log)
			var want []map[string]string
			if tt.want != nil {
				maps.Copy(tt.want, map[string]string{"SYSLOG_IDENTIFIER": "prog", "SYSLOG_FACILITY": "1"})
				want = append(want, tt.want)
			}
			if diff := cmp.Diff(want, d.read()); diff != "" {
				t.Errorf("(-want +have):\n%s", diff)
			}
			if said := d.said(); said != "" {
				t.Errorf("on stderr, too: %q", said)
			}
		})
	}
}

// TestJournalSize: the largest entry goes in one datagram.
func TestJournalSize(t *testing.T) {
	d := newJournald(t)
	var fields []zap.Field
	for i := range 100 {
		fields = append(fields, zap.String(fmt.Sprintf("%d%s", i, strings.Repeat("k", 100)),
			strings.Repeat("v\n", 5000)))
	}
	d.log.Error(strings.Repeat("m", 100_000), fields...)
	if all := d.read(); len(all) != 1 || len(all[0]) != 4+maxFields {
		t.Errorf("%d entries; on stderr %.100q", len(all), d.said())
	}
}

// TestJournalAway: while journald's socket is away the lines go to stderr, and the new socket is
// found by itself.
func TestJournalAway(t *testing.T) {
	d := newJournald(t)
	d.stop()
	d.log.Error("two\nlines", zap.Int("n", 1))
	d.log.Info("more")
	want := regexp.MustCompile(`^<3>\S+Z two lines n=1\n<6>\d{4}-\S+Z more\n$`)
	if said := d.said(); !want.MatchString(said) {
		t.Errorf("have %q on stderr", said)
	}
	d.start()
	d.log.Info("again")
	if all := d.read(); len(all) != 1 || all[0]["MESSAGE"] != "again" {
		t.Errorf("have %v", all)
	}
}

// TestJournalHangs: a journald that reads nothing holds up nobody, however much is said. What it
// did not take is counted and told. (That this test ends is its first half: each line would wait.)
func TestJournalHangs(t *testing.T) {
	d := newJournald(t)
	const lines = 20_000
	for i := range lines {
		d.log.Info("line", zap.Int("i", i))
	}
	entries, said := d.read(), d.said()
	took := len(entries) + strings.Count(said, "\n")
	if len(entries) == 0 || said == "" || took >= lines || strings.Contains(said, " line i=0\n") ||
		!strings.HasSuffix(said, "\n") {
		t.Fatalf("of %d lines %d entries, on stderr %.100q…", lines, len(entries), said)
	}
	d.log.Info("after")
	d.log.Info("and on")
	var have []string
	for _, e := range d.read() {
		have = append(have, e["PRIORITY"]+" "+e["MESSAGE"])
	}
	want := []string{fmt.Sprintf("4 log lines were lost, as journald took none lines=%d", lines-took),
		"6 after", "6 and on"}
	if !slices.Equal(have, want) {
		t.Errorf("have %q, want %q", have, want)
	}
}

// TestInJournal: the variable counts only where it names stderr. A test's stderr is not a
// journal's.
func TestInJournal(t *testing.T) {
	var stat unix.Stat_t
	if err := unix.Fstat(2, &stat); err != nil {
		t.Fatal(err)
	}
	for value, want := range map[string]bool{
		"":                                       false,
		"8:1":                                    false,
		"x":                                      false,
		fmt.Sprintf("%d:%d", stat.Dev, stat.Ino): true,
		fmt.Sprintf("%d:%d", stat.Dev, stat.Ino+1): false,
	} {
		t.Setenv("JOURNAL_STREAM", value)
		if have := InJournal(); have != want {
			t.Errorf("JOURNAL_STREAM=%q: %v", value, have)
		}
	}
}
