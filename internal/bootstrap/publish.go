package bootstrap

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// publisher writes the status itself where no daemon does.
type publisher struct {
	writer *guestattr.Writer
	cancel context.CancelFunc
	ended  chan struct{}
	ctx    context.Context
	log    *zap.Logger
}

func newPublisher(ctx context.Context, log *zap.Logger) *publisher {
	return &publisher{ctx: ctx, log: log}
}

// publish sets the guest attributes when the daemon is not there to do it, or cannot know (unread).
func (p *publisher) publish(state progress.State, unread bool) {
	if !unread && daemonRuns() {
		p.stop() // or what it has left to write would come after the daemon's
		return
	}
	if p.writer == nil {
		ctx, cancel := context.WithCancel(p.ctx)
		opts := guestattr.Options{Log: p.log}
		if haveRuntimeDir() {
			opts.Budget = budgetFile // the daemon may be about to write, or this be the next try
		}
		p.writer, p.cancel, p.ended = guestattr.New(opts), cancel, make(chan struct{})
		go func() {
			defer close(p.ended)
			_ = p.writer.Run(ctx) // ends with ctx, which is no error
		}()
	}
	p.writer.Set(guestattr.BootstrapStatus, state.Status)
	if line := state.FailureLine(); line != "" {
		p.writer.Set(guestattr.BootstrapLastFailure, line)
	}
}

// haveRuntimeDir says whether the daemon's folder is there. Before its first start this makes it,
// where systemd gives it to the daemon's user then (RuntimeDirectory=, systemd.exec(5));
// sd_booted(3) tells whether there is a systemd.
func haveRuntimeDir() bool {
	if _, err := os.Lstat(progress.RuntimeDir); err == nil {
		return true
	}
	_, err := os.Lstat("/run/systemd/system")
	return err == nil && os.Mkdir(progress.RuntimeDir, 0o755) == nil
}

// end waits for the last value to be written, which within the budget takes milliseconds and past
// it may take a token's 20 s.
func (p *publisher) end() {
	if p.writer == nil {
		return
	}
	ctx, stop := context.WithTimeout(p.ctx, 25*time.Second)
	defer stop()
	if err := p.writer.Flush(ctx); err != nil {
		p.log.Warn("the status is not published", zap.Error(err))
	}
	p.stop()
}

func (p *publisher) stop() {
	if p.writer != nil {
		p.cancel()
		<-p.ended
		p.writer = nil
	}
}

// daemonRuns asks the daemon's socket.
func daemonRuns() bool {
	conn, err := net.DialTimeout("unix", filepath.Join(progress.RuntimeDir, "agent.sock"), time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}
