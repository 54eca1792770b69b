package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/spf13/pflag"
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
		http.StatusOK: 0, http.StatusServiceUnavailable: exitNo, http.StatusNotFound: exitNo,
		http.StatusAccepted: 0,
	} {
		code.Store(answer)
		if got := wait(); got != want {
			t.Errorf("with answer %d: exit code %d, want %d", answer, got, want)
		}
	}
	server.Close()
	if got := wait(); got != exitNo {
		t.Errorf("with nobody there: exit code %d, want %d", got, exitNo)
	}
}
