package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// tab is what a shell is told when somebody presses Tab behind these words, the last of which may
// be incomplete: the values with their descriptions, and whether the shell offers files.
func tab(t *testing.T, words ...string) (offered map[string]string, files bool) {
	t.Helper()
	root := rootCommand()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&bytes.Buffer{})
	root.SetArgs(append([]string{cobra.ShellCompRequestCmd}, words...))
	if err := root.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	offered = map[string]string{}
	for line := range strings.Lines(out.String()) {
		line = strings.TrimSuffix(line, "\n")
		if directive, is := strings.CutPrefix(line, ":"); is {
			return offered, directive == "0"
		}
		value, about, _ := strings.Cut(line, "\t")
		offered[value] = about
	}
	t.Fatalf("no directive in %q", out.String())
	return nil, false
}

func TestTab(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", t.TempDir()) // without a daemon
	for line, want := range map[string]struct {
		some  string // that are offered among others
		only  bool   // nothing else is
		files bool
	}{
		"":                                {some: "status doctor explain diff run help"},
		"do":                              {some: "doctor", only: true},
		"nonsense ":                       {only: true},
		"help ":                           {some: "status doctor explain"},
		"help doctor ":                    {only: true},
		"doctor ":                         {only: true},
		"doctor -o ":                      {some: "text json", only: true},
		"explain 10.0.0.1:80 --output=":   {some: "text json", only: true},
		"diff -o j":                       {some: "json", only: true},
		"status -o ":                      {some: "text json", only: true},
		"doctor --fail-on ":               {some: "error warning advice", only: true},
		"doctor --ignore ":                {some: "envoy-down drift"},
		"doctor --ignore envoy-down,drif": {some: "envoy-down,drift", only: true},
		"explain ":                        {only: true},
		"explain 10.0.0.1:80 ":            {only: true},
		"explain 10.0.0.1:80 --uid ":      {some: "root nobody"},
		"explain 10.0.0.1:80 --gid roo":   {some: "root", only: true},
		"explain --in-interface l":        {some: "lo", only: true},
		"run --proxy-user nob":            {some: "nobody", only: true},
		"run --resolver-users root,nob":   {some: "root,nobody", only: true},
		"run --intercept-interfaces ":     {some: "lo"},
		"run --when-envoy-down ":          {some: "keep bypass", only: true},
		"run --cloud-logging ":            {some: "auto on off", only: true},
		"bootstrap --log-level ":          {some: "debug info warn error", only: true},
		"bootstrap --r":                   {some: "--remove --rollback", only: true},
		"diff --config ":                  {only: true, files: true},
		"run --web-config-file ":          {only: true, files: true},
		"run --listen ":                   {only: true},
		"wait --timeout ":                 {only: true},
		"version ":                        {only: true},
	} {
		words := strings.Split(line, " ")
		have, files := tab(t, words...)
		some := strings.Fields(want.some)
		for _, value := range some {
			if _, there := have[value]; !there {
				t.Errorf("%q: no %s in %v", line, value, have)
			}
		}
		if want.only && len(have) != len(some) || files != want.files {
			t.Errorf("%q: %v, files %v", line, slices.Sorted(maps.Keys(have)), files)
		}
	}
	have, _ := tab(t, "doctor", "--ignore", "envoy-dow")
	if have["envoy-down"] != "Envoy is not running" {
		t.Errorf("without a description: %v", have)
	}
	if have, _ := tab(t, "doctor", "--ignore", "drift,"); len(have) != len(symptom.Kinds())-1 {
		t.Errorf("a check is offered twice, or one is not: %v", have)
	}
}

// TestTabOffersFiles only where a value is a file, so that Tab leads nowhere wrong.
func TestTabOffersFiles(t *testing.T) {
	for _, c := range rootCommand().Commands() {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			kind, _ := pflag.UnquoteUsage(f)
			if f.Value.Type() == "bool" || f.Hidden {
				return
			}
			if _, files := tab(t, c.Name(), "--"+f.Name, ""); files != (kind == "FILE") {
				t.Errorf("%s --%s %s: files are offered: %v", c.Name(), f.Name, kind, files)
			}
		})
	}
}

// TestTabAddresses: `explain` completes the addresses of the daemon's services, with their names,
// and waits no longer than a person does.
func TestTabAddresses(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", filepath.Join(t.TempDir(), "run"))
	if err := os.Mkdir(server.Dir(), 0o700); err != nil {
		t.Fatal(err)
	}
	socket, err := server.Socket(server.Dir())
	if err != nil {
		t.Fatal(err)
	}
	s := status.Status{Services: []status.Service{
		{Name: "web", Addresses: []string{"*:80", "10.0.0.1:80", "10.1.0.0/24", "[fd00::1]:80"}},
		{Name: "evil\x1b[31m\nname\t", Addresses: []string{"10.0.0.2:443", "\x1b[2J"}},
	}}
	many := status.Service{Name: "many"}
	for i := range 1000 {
		many.Addresses = append(many.Addresses, fmt.Sprintf("10.2.0.1:%d", i+1))
	}
	s.Services = append(s.Services, many)
	var newest atomic.Value
	newest.Store(s)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = socket.Serve(ctx, server.Answers{Status: newest.Load}, nil)
	}()
	defer func() { stop(); <-ended }()
	have, files := tab(t, "explain", "10.0.")
	want := map[string]string{"10.0.0.1:80": "web", "10.0.0.2:443": "evil�[31m name"}
	if !maps.Equal(have, want) || files {
		t.Errorf("%q, files %v, want %q", have, files, want)
	}
	if have, _ := tab(t, "explain", "[f"); have["[fd00::1]:80"] != "web" {
		t.Errorf("IPv6: %q", have)
	}
	if have, _ := tab(t, "explain", ""); len(have) != maxAddresses {
		t.Errorf("%d addresses, want %d", len(have), maxAddresses)
	}
	if have, _ := tab(t, "explain", "10.0.0.1:80", ""); len(have) != 0 {
		t.Errorf("a second address is offered: %q", have)
	}
}

// TestTabHung: a daemon that takes the connection and says nothing.
func TestTabHung(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", t.TempDir())
	hung, err := server.Socket(server.Dir()) // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close() // the garbage collector would close one that nobody holds
	began := time.Now()
	if have, files := tab(t, "explain", ""); len(have) != 0 || files {
		t.Errorf("%q, files %v", have, files)
	}
	if took := time.Since(began); took < askLimit || took > 4*askLimit {
		t.Errorf("took %v", took)
	}
}
