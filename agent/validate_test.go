package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestValidate: each setting that cannot work is refused by the name of its flag.
func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		change func(*Settings)
		want   string // in the error; "": none
	}{
		{func(*Settings) {}, ""},
		{func(s *Settings) { s.WhenEnvoyDown = "bypass" }, ""},
		{func(s *Settings) { s.WhenEnvoyDown = "" }, `--when-envoy-down is ""; use keep or bypass`},
		{func(s *Settings) { s.CloudLogging = "yes" },
			`--cloud-logging is "yes"; use auto, on or off`},
		{func(s *Settings) { s.CloudLogging = "true" }, ""},
		{func(s *Settings) { s.WhenEnvoyDown = "Keep" }, `--when-envoy-down is "Keep"`},
		{func(s *Settings) { s.EnvoyShare = 1 }, ""},
		{func(s *Settings) { s.EnvoyShare = 50 }, ""},
		{func(s *Settings) { s.EnvoyShare = 0 },
			"--envoy-share is 0; use a whole number of percent from 1 to 50"},
		{func(s *Settings) { s.EnvoyShare = 51 }, "--envoy-share is 51; use"},
		{func(s *Settings) { s.EnvoyShare = -1 }, "--envoy-share is -1; use"},
		{func(s *Settings) { s.ProxyUser = "" }, "--proxy-user is empty"},
		{func(s *Settings) { s.Listen = "" }, ""},
		{func(s *Settings) { s.Listen = "127.0.0.1:1" }, ""},
		{func(s *Settings) { s.Listen = "[::]:65535" }, ""},
		{func(s *Settings) { s.Listen = ":0" }, `--listen is ":0"; use host:port or :port`},
		{func(s *Settings) { s.Listen = ":65536" }, `--listen is ":65536"`},
		{func(s *Settings) { s.Listen = ":http" }, `--listen is ":http"`},
		{func(s *Settings) { s.Listen = ":" }, `--listen is ":"`},
		{func(s *Settings) { s.Listen = "15020" }, `--listen is "15020"`},
		{func(s *Settings) { s.MetricsListen = "127.0.0.1:9460" }, ""},
		{func(s *Settings) { s.MetricsListen, s.WebConfigFile = ":9460", "no-such-file" }, ""},
		{func(s *Settings) { s.Listen, s.MetricsListen = "", ":15020" }, ""},
		{func(s *Settings) { s.MetricsListen = "9460" }, `--metrics-listen is "9460"; use host:port or`},
		{func(s *Settings) { s.MetricsListen = "10.0.0.2:15020" },
			`--metrics-listen is "10.0.0.2:15020", which has the port of --listen ":15020"`},
		{func(s *Settings) { s.MetricsListen = ":015020" }, `has the port of --listen`},
		{func(s *Settings) { s.WebConfigFile = "/etc/w.yml" },
			`--web-config-file is "/etc/w.yml" without --metrics-listen`},
		{func(s *Settings) { s.Interfaces = []string{"docker0", "veth+", "a23456789012345"} }, ""},
		{func(s *Settings) { s.Interfaces = []string{"eth0", ""} },
			`--intercept-interfaces has ""`},
		{func(s *Settings) { s.Interfaces = []string{"a234567890123456"} },
			`has "a234567890123456"`},
		{func(s *Settings) { s.Interfaces = []string{"a b"} }, `has "a b"`},
		{func(s *Settings) { s.Interfaces = []string{"a\x1f"} }, `has "a\x1f"`},
		{func(s *Settings) { s.Interfaces = []string{"a\x7f"} }, `has "a\x7f"`},
		{func(s *Settings) { s.Interfaces = []string{"ä"} }, `has "ä"`},
		{func(s *Settings) { s.Interfaces = []string{"a/b"} }, `has "a/b"`},
		{func(s *Settings) { s.Interfaces = []string{`a"`} }, `which is no interface name`},
		{func(s *Settings) { s.Interfaces = []string{`a'`} }, `has "a'"`},
		{func(s *Settings) { s.Interfaces = []string{`a\`} }, `has "a\\"`},
		{func(s *Settings) { s.Interfaces = []string{"~!"} }, ""}, // the kernel takes it
	} {
		s := Settings{WhenEnvoyDown: "keep", ProxyUser: "envoy", EnvoyShare: 10,
			Listening: Listening{Listen: ":15020"}}
		tt.change(&s)
		err := s.Validate()
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%+v: %v", s, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%+v: %v, want %q", s, err, tt.want)
		case tt.want != "" && !errors.Is(err, ErrSettings):
			t.Errorf("%+v: %v is not a setting's", s, err)
		}
	}
}

// TestOwnPorts: the usual ones, and what the settings name.
func TestOwnPorts(t *testing.T) {
	for _, tt := range []struct {
		admin, listen, metrics string
		want                   []uint16
	}{
		{"127.0.0.1:15000", ":15020", "", []uint16{15000, 15001, 15006, 15020}},
		{"127.0.0.1:9901", ":80", ":9460", []uint16{80, 9460, 9901, 15000, 15001, 15006, 15020}},
		{"unix:///run/envoy.sock", "", "", []uint16{15000, 15001, 15006, 15020}},
	} {
		got := ownPorts(Settings{
			EnvoyAdmin: tt.admin,
			Listening:  Listening{Listen: tt.listen, MetricsListen: tt.metrics}})
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s and %s: %v, want %v", tt.admin, tt.listen, got, tt.want)
		}
	}
	if got := portString(15001); got != "15001" {
		t.Errorf("portString: %q", got)
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if !sleep(t.Context(), time.Minute) || time.Since(began) != time.Minute {
			t.Errorf("slept for %v", time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		if sleep(ctx, time.Minute) || time.Since(began) != time.Second {
			t.Errorf("slept for %v of a second that was left", time.Since(began))
		}
	})
}
