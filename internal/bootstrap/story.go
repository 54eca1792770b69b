package bootstrap

import (
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// begin notes the step under way.
func (b *bootstrapper) begin(step string) {
	// FAILED stays while retries go through the steps.
	if b.state.Status != progress.Failed || b.state.Attempt == 1 {
		b.state.Status = progress.InProgress
	}
	if b.state.Attempt == 1 && !b.again {
		b.say("INFO", step)
	}
	b.state.Step = step
	b.save()
}

// fail notes why the attempt ended, and what comes next.
func (b *bootstrapper) fail(f *Failure, wait time.Duration) {
	now := time.Now()
	text := progress.OneLine(f.Error())
	if text != b.state.Failure || b.state.Status != progress.Failed {
		b.say("ERROR", text)
	}
	b.state.Status, b.state.Step = progress.Failed, f.Step
	b.state.Failure, b.state.FailureTime = text, now
	b.state.Permanent, b.state.Retry = f.Permanent, now.Add(wait)
	b.state.Next = "it is tried again by itself, at least each minute"
	if f.Permanent {
		b.state.Next = "it is tried again when the attribute changes, and at least every 5 minutes"
	}
	b.save()
	b.Log.Error("bootstrap failed", zap.String("id", string(symptom.Bootstrap)),
		zap.String("cause", "Bootstrap failed: "+text), zap.String("next", b.state.Next),
		zap.String("step", f.Step), zap.Error(f), zap.Duration("retry", wait))
}

// finish notes that the VM is as this attribute wants it.
func (b *bootstrapper) finish(attr metadata.Attribute) {
	b.state.AttributeSum = progress.Sum(string(attr.Text))
	b.state.Status, b.state.Step = progress.Finished, ""
	b.state.Next, b.state.Retry, b.state.Permanent = "", time.Time{}, false
	b.say("INFO", "finished: Envoy "+b.state.EnvoyVersion+" runs")
	b.save()
}

// say adds a line to the story, and to our own log.
func (b *bootstrapper) say(severity, text string) {
	b.state.Tell(time.Now(), severity, text)
	if severity != "ERROR" { // fail logs it with its fields
		b.Log.Info("bootstrap: " + text)
	}
}

// save writes the state down. A full disk must not stop bootstrap, which may be about to make room:
// then it is published alone.
func (b *bootstrapper) save() {
	b.state.Time = time.Now().UTC()
	err := os.MkdirAll(b.path(progress.StateDir), 0o700)
	if err == nil {
		err = progress.Write(b.path(progress.StateDir), b.state)
	}
	if b.pub != nil {
		b.pub.publish(b.state, err != nil)
	}
	if err != nil {
		b.Log.Warn("cannot write the state", zap.Error(err))
	}
}
