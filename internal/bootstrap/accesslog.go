package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// makeLogs makes the access log's folder, and outside logs.Dir, which Envoy's sandbox would refuse,
// sees to the right to write there. logs.Dir itself is made by tmpfiles.d.
func (b *bootstrapper) makeLogs(ctx context.Context, cfg attribute.Config) error {
	outside, name := "", filepath.Clean(cfg.AccessLog)
	// /dev/stdout is envoy.out.log.
	if dir := filepath.Dir(name); cfg.AccessLog != "" && dir != logs.Dir && dir != "/dev" {
		if !logs.InDir(name) {
			outside = dir
		}
		if err := logs.Make(b.Root, name, b.giveToEnvoy); err != nil {
			err = fmt.Errorf("make the access log: %w", err)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, untrusted.ErrLink) {
				return &Failure{Err: err, Advice: "give access-log a path in a folder that exists, " +
					logs.Dir + " for instance"}
			}
			return err
		}
	}
	changed, err := systemd.SetWritable(b.Root+"/", systemd.EnvoyUnit, outside)
	if err != nil {
		return err
	}
	if changed {
		err := errors.Join(b.markUnitChanged("where it may write is another now"), b.markRestart())
		if err != nil {
			return err
		}
	}
	rotation, err := systemd.SetWritable(b.Root+"/", systemd.RotateUnit, outside)
	if err != nil || !changed && !rotation {
		return err
	}
	return b.systemctl(ctx, time.Minute, "daemon-reload")
}

// giveToEnvoy makes Envoy's user the owner of an open file.
func (b *bootstrapper) giveToEnvoy(f *os.File) error {
	if b.Root != "" {
		return nil
	}
	uid, gid, err := lookup(EnvoyUser)
	if err != nil {
		return err
	}
	return f.Chown(uid, gid)
}
