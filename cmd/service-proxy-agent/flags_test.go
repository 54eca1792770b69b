package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
)

// TestEnvironmentTwins: each flag of each command is also taken from the environment, where a flag
// on the command line wins.
func TestEnvironmentTwins(t *testing.T) {
	flags := 0
	for _, c := range rootCommand().Commands() {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Name == "help" {
				return
			}
			flags++
			// Two values that the flag takes and that are not its default.
			one, two := "one", "two"
			switch f.Value.Type() {
			case "bool":
				one, two = "true", "false"
			case "duration":
				one, two = "1m1s", "2m2s"
			case "int":
				one, two = "11", "12"
			}
			value := func(args ...string) string {
				t.Helper()
				root := rootCommand()
				for _, again := range root.Commands() {
					if again.Name() != c.Name() {
						continue
					}
					if err := again.ParseFlags(args); err != nil {
						t.Fatal(err)
					}
					if err := again.PreRunE(again, nil); err != nil {
						t.Errorf("%s --%s: %v", c.Name(), f.Name, err)
					}
					return again.Flags().Lookup(f.Name).Value.String()
				}
				t.Fatalf("no command %s", c.Name())
				return ""
			}
			t.Run(c.Name()+"/"+f.Name, func(t *testing.T) {
				name := envName(f.Name)
				t.Setenv(name, one)
				if f.Value.Type() == "stringSlice" {
					one, two = "[one]", "[two]"
				}
				if got := value(); got != one {
					t.Errorf("%s=%s: %q", name, one, got)
				}
				flag := two
				if f.Value.Type() == "stringSlice" {
					flag = "two"
				}
				if got := value("--" + f.Name + "=" + flag); got != two {
					t.Errorf("%s=%s --%s=%s: %q, want the flag's", name, one, f.Name, flag, got)
				}
			})
		})
	}
	if flags < 15 {
		t.Errorf("only %d flags", flags)
	}
}

// TestEnvoyShare: a whole number of percent from 1 to 50 in decimal digits, by the flag or by its
// twin. What else is said is wrong usage, in words that say what to write.
func TestEnvoyShare(t *testing.T) {
	const noNumber = "it is no whole number of percent"
	const outside = "use a whole number of percent from 1 to 50"
	for value, want := range map[string]string{
		"": noNumber, "ten": noNumber, "10%": noNumber, "0.1": noNumber, "1e1": noNumber,
		"0x10": noNumber, "-1": noNumber, "+10": noNumber, " 10": noNumber, "99999999999": noNumber,
		"0": outside, "51": outside, "100": outside,
	} {
		for _, twin := range []bool{false, true} {
			args := []string{"run", "--envoy-share=" + value}
			if twin {
				t.Setenv("SERVICE_PROXY_AGENT_ENVOY_SHARE", value)
				args = args[:1]
			}
			code, said := executed(t, args...)
			if code != exitcode.Usage || !strings.Contains(said, want) ||
				!strings.Contains(strings.ToLower(strings.ReplaceAll(said, "_", "-")), "envoy-share") {
				t.Errorf("%q, by its twin %v: exit code %d, %q; want %q", value, twin, code, said, want)
			}
		}
	}
	os.Unsetenv("SERVICE_PROXY_AGENT_ENVOY_SHARE")
	for value, want := range map[string]string{"": "10", "1": "1", "010": "10", "50": "50"} {
		c := runCommand()
		var args []string
		if value != "" {
			args = []string{"--envoy-share=" + value}
		}
		if err := c.ParseFlags(args); err != nil || c.Flag("envoy-share").Value.String() != want {
			t.Errorf("%q: %v, %v", value, c.Flag("envoy-share").Value, err)
		}
	}
}

// executed is what a command ends with, and what it says on stderr.
func executed(t *testing.T, args ...string) (code int, said string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	was := os.Stderr
	os.Stderr = w
	code = execute(t.Context(), args)
	os.Stderr = was
	w.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return code, string(text)
}

// TestWait asks /healthz/ready, which every user may.
func TestWait(t *testing.T) {
	var code atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz/ready" {
			t.Errorf("asked %s", r.URL.Path)
		}
		w.WriteHeader(int(code.Load()))
		fmt.Fprintln(w, "Envoy is PRE_INITIALIZING, not LIVE")
		code.CompareAndSwap(http.StatusAccepted, http.StatusOK) // this once not ready
	}))
	wait := func() int {
		return execute(
			t.Context(), []string{"wait", "--listen", server.Listener.Addr().String(), "--timeout", "400ms"})
	}
	for answer, want := range map[int32]int{
		http.StatusOK: 0, http.StatusServiceUnavailable: exitcode.No, http.StatusNotFound: exitcode.No,
		http.StatusAccepted: 0,
	} {
		code.Store(answer)
		if got := wait(); got != want {
			t.Errorf("with answer %d: exit code %d, want %d", answer, got, want)
		}
	}
	server.Close()
	if got := wait(); got != exitcode.No {
		t.Errorf("with nobody there: exit code %d, want %d", got, exitcode.No)
	}
}
