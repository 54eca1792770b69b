package envoyadmin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRecent: what the log's end tells of the Envoy that writes it, and nothing of the one before.
func TestRecent(t *testing.T) {
	const (
		epoch = "[2026-11-28 10:00:00.000][7][info][main] [source/server/server.cc:463] " +
			"initializing epoch 0 (base id=0, hot restart version=11.104)\n"
		closed = "[2026-11-28 10:00:01.500][7][warning][config] [./source/extensions/" +
			"config_subscription/grpc/grpc_stream.h:226] StreamAggregatedResources gRPC config stream " +
			"to td closed: 7, Permission denied\n"
		changed = "[2026-11-28 10:00:09.250][7][info][upstream] [source/common/listener_manager/" +
			"lds_api.cc:106] lds: add/update listener 'a'\n"
		plain = "StreamAggregatedResources gRPC config stream closed: 5, not found\n"
	)
	at := func(second float64) time.Time {
		return time.Date(2026, 11, 28, 10, 0, 0, 0, time.Local).
			Add(time.Duration(second * float64(time.Second)))
	}
	end := func(n int, code int, target, message string, when time.Time) Logged {
		return Logged{LogEvent{Kind: StreamClosed, Method: "StreamAggregatedResources", Target: target,
			Code: code, Message: message, Count: n}, when}
	}
	news := Logged{LogEvent{Kind: ListenerChanged, Listener: "a", Count: 1}, at(9.25)}
	denied := end(2, 7, "td", "Permission denied", at(1.5))
	for name, tt := range map[string]struct {
		log  string
		want []Logged
	}{
		"empty":         {"", nil},
		"another Envoy": {changed + closed + epoch, nil},
		"the next Envoy": {epoch + closed + strings.Replace(epoch, "epoch 0", "epoch 3", 1) + changed,
			[]Logged{{LogEvent{Kind: EnvoyStarts, Epoch: 3, Count: 1}, at(0)}, news}},
		"a storm":        {epoch + closed + closed + changed, []Logged{denied, news}},
		"another format": {plain, []Logged{end(1, 5, "", "not found", time.Time{})}},
		"a line under way": {epoch + closed + closed + strings.TrimSuffix(changed, "\n"),
			[]Logged{denied, news}},
		"a long log": {plain + strings.Repeat(strings.Repeat("x", 99)+"\n", recentBytes/100) + changed,
			[]Logged{news}},
	} {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(tt.log), 0o600); err != nil {
			t.Fatal(err)
		}
		have, err := Recent(path)
		if diff := cmp.Diff(tt.want, have); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
}

// TestRecentIsBounded: of a log that is full of what might tell something only the last lines are
// understood, whatever it is that fills it; and an Envoy that starts is seen behind all of that.
func TestRecentIsBounded(t *testing.T) {
	const (
		begin = "[2026-11-28 10:00:00.000][7][info][main] [x.cc:1] "
		start = begin + "initializing epoch 2 (base id=0, hot restart version=11.104)\n"
	)
	for name, line := range map[string]func(i int) string{
		"listeners": func(i int) string { return fmt.Sprintf("lds: add/update listener 'x%d'", i) },
		"rejections": func(i int) string {
			return fmt.Sprintf("delta config for type.googleapis.com/envoy.config.cluster.v3.Cluster rejected: %d", i)
		},
		"streams": func(i int) string {
			return fmt.Sprintf("StreamAggregatedResources gRPC config stream to x closed: 7, %d", i)
		},
		"nothing": func(int) string { return "lds: gRPC config stream rejected" },
	} {
		log := strings.Builder{}
		log.WriteString(start)
		for i := 0; log.Len() < recentBytes-200; i++ {
			log.WriteString(begin + line(i) + "\n")
		}
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(log.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		var have []Logged
		var err error
		allocated := testing.AllocsPerRun(1, func() { have, err = Recent(path) })
		if err != nil || len(have) == 0 || have[0].Kind != EnvoyStarts || have[0].Epoch != 2 {
			t.Errorf("%s: %v, the first is %+v, want the start", name, err, have[:min(1, len(have))])
		}
		if want := recentLines + 1; name != "nothing" && len(have) != want {
			t.Errorf("%s: %d events, want %d", name, len(have), want)
		}
		if allocated > 50*recentLines {
			t.Errorf("%s: %.0f allocations for %d lines", name, allocated, recentLines)
		}
	}
}

// TestRecentIsNotKept: what is no file is not waited for, and no link is followed.
func TestRecentIsNotKept(t *testing.T) {
	dir := t.TempDir()
	fifo, link := filepath.Join(dir, "fifo"), filepath.Join(dir, "link")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, link, dir} {
		if events, err := Recent(path); err == nil {
			t.Errorf("%s: %v", path, events)
		}
	}
	if _, err := Recent(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}
