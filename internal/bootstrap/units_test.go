package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

const updateCatalog = "journalctl --update-catalog"

// The journal is told of the catalog when it does not have it, and again where that failed, which
// is no reason to fail.
func TestCatalogIsUpdated(t *testing.T) {
	v := newFakeVM(t)
	core, logged := observer.New(zap.WarnLevel)
	opts, fails := v.options(), false
	opts.Log = zap.New(core)
	run := opts.command
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		err := run(ctx, cmd)
		if cmd.Args[0] != "journalctl" {
			return err
		}
		if fails {
			fmt.Fprintln(cmd.Stderr, "Failed to open the database")
			return errors.New("exit status 1")
		}
		v.put(systemd.CatalogDatabase, "made of all catalogs")
		return nil
	}
	install := func() (updated bool) {
		t.Helper()
		v.ran = nil
		if err := InstallUnits(t.Context(), opts); err != nil {
			t.Fatal(err)
		}
		return slices.Contains(v.ran, updateCatalog)
	}
	age := func(name string, by time.Duration) {
		t.Helper()
		when := time.Now().Add(-by)
		if err := os.Chtimes(newBootstrapper(opts).path(name), when, when); err != nil {
			t.Fatal(err)
		}
	}
	v.put(systemd.CatalogDatabase, "of the image")
	age(systemd.CatalogDatabase, time.Hour)
	for i, want := range []struct{ fails, updated bool }{
		{true, true}, {true, true}, {false, true}, {false, false}, {true, false},
	} {
		if fails = want.fails; install() != want.updated {
			t.Errorf("run %d: %v", i, v.ran)
		}
	}
	if all := logged.All(); len(all) != 2 ||
		!strings.Contains(fmt.Sprint(all[0].ContextMap()), "exit status 1: Failed to open the database") {
		t.Errorf("logged %v", all)
	}
	v.put(systemd.CatalogFile(), "of another version")
	if fails = false; !install() {
		t.Error("not after an upgrade")
	}
	if err := os.Remove(newBootstrapper(opts).path(systemd.CatalogDatabase)); err != nil {
		t.Fatal(err)
	}
	if !install() {
		t.Error("not where there is no database")
	}

	remove := func() string {
		t.Helper()
		v.ran = nil
		done, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
			return nil, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(done, "\n")
	}
	fails = true
	if done := remove(); !strings.Contains(done, "removed "+systemd.CatalogFile()) ||
		!strings.Contains(done, "left the words of our messages in "+systemd.CatalogDatabase) {
		t.Errorf("did\n%s", done)
	}
	if done := remove(); strings.Contains(done, "atalog") || slices.Contains(v.ran, updateCatalog) {
		t.Errorf("the second time: %v\n%s", v.ran, done)
	}
	fails = false
	install()
	if done := remove(); !slices.Contains(v.ran, updateCatalog) || strings.Contains(done, "left the") {
		t.Errorf("did %v\n%s", v.ran, done)
	}
}
