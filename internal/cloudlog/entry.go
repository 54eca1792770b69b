package cloudlog

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
)

const (
	maxMessage = 1024 // bytes of a message or another value, as on the serial port
	maxPayload = 3072 // bytes of all of an entry's values and their names
	overhead   = 64   // bytes that an entry costs beside its text, or more
)

// entry is a LogEntry in JSON, with its own timestamp and insertId.
type entry struct {
	text  []byte
	tells uint64 // of a notice: how many dropped entries it tells of; 0: it is none
}

func (e entry) size() int { return len(e.text) + overhead }

// payload is an event's jsonPayload but for its time.
func payload(e report.Event) map[string]string {
	p := map[string]string{}
	left := maxPayload
	put := func(key, value string) {
		value = guestattr.OneLine(redaction.Secrets(value), maxMessage)
		if _, taken := p[key]; taken || value == "" || len(key)+len(value) > left {
			return
		}
		p[key] = value
		left -= len(key) + len(value)
	}
	put("message", e.Message)
	put("id", string(e.Finding.ID))
	put("key", e.Finding.Key)
	put("cause", e.Finding.Cause)
	put("next", e.Finding.Next)
	for _, f := range e.Fields {
		if f.Key != "localTimestamp" {
			put(f.Key, f.Value)
		}
	}
	return p
}

// entry makes the next one; w.mu is held.
func (w *Writer) entry(now time.Time, severity report.Severity, p map[string]string) entry {
	// The fixed four digits are what Google's agents write.
	p["localTimestamp"] = now.UTC().Format("2006-01-02T15:04:05.0000Z")
	// Entries of one timestamp are shown in the order of their insertIds.
	id := fmt.Sprintf("%s-%012d", w.process, w.next)
	w.next++
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false) // it would make six bytes of a < or &
	err := enc.Encode(struct {
		Timestamp string            `json:"timestamp"`
		Severity  report.Severity   `json:"severity"`
		InsertID  string            `json:"insertId"`
		Payload   map[string]string `json:"jsonPayload"`
	}{now.UTC().Format(time.RFC3339Nano), cmp.Or(severity, report.Info), id, p})
	if err != nil {
		panic(err) // strings always marshal
	}
	return entry{text: bytes.Clone(bytes.TrimSpace(text.Bytes()))}
}

// push queues an entry; w.mu is held.
func (w *Writer) push(e entry, now time.Time) {
	if len(w.queue) == 0 {
		w.since = now
	}
	w.queue = append(w.queue, e)
	w.bytes += e.size()
	for w.bytes > maxQueue && w.dropOldest() {
	}
}

// dropOldest drops the first of the queue that is no notice; w.mu is held. A notice may have been
// written already, its answer lost, and must not be told by another one again. There is one at the
// most: the next is made after a request that took this one.
func (w *Writer) dropOldest() bool {
	i := slices.IndexFunc(w.queue, func(e entry) bool { return e.tells == 0 })
	if i < 0 {
		return false
	}
	w.drop(w.queue[i])
	copy(w.queue[1:], w.queue[:i])
	w.queue[0] = entry{} // or its text would stay as long as the array
	w.queue = w.queue[1:]
	return true
}

// drop counts an entry that will never be written; w.mu is held. What a notice would have told is
// told by a later one.
func (w *Writer) drop(e entry) {
	w.bytes -= e.size()
	if e.tells > 0 {
		w.missed += e.tells
		return
	}
	w.missed++
	w.state.Dropped++
}

// notice puts an entry before all others that tells of those that were dropped; w.mu is held.
func (w *Writer) notice(now time.Time) {
	e := w.entry(now, report.Warning, map[string]string{
		"message": fmt.Sprintf("%d entries dropped: Cloud Logging did not take them", w.missed),
		"dropped": fmt.Sprint(w.missed),
	})
	e.tells, w.missed = w.missed, 0
	if len(w.queue) == 0 {
		w.since = now
	}
	w.queue = append([]entry{e}, w.queue...)
	w.bytes += e.size()
}

// take takes a batch off the queue: as many entries as a request and the limiter allow.
func (w *Writer) take(now time.Time) (batch []entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	bytes := 0
	for _, e := range w.queue {
		if len(batch) == maxEntries || len(batch) > 0 && bytes+e.size() > maxBatch ||
			!w.run.entries.AllowN(now, 1) {
			break
		}
		batch = append(batch, e)
		bytes += e.size()
	}
	clear(w.queue[:len(batch)])
	w.queue = w.queue[len(batch):]
	w.since = now // of the rest, or of what comes back
	return batch
}

// giveBack puts a batch back to where it was taken from.
func (w *Writer) giveBack(batch []entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue = append(batch, w.queue...)
}

// written counts entries that are written.
func (w *Writer) written(batch []entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range batch {
		w.bytes -= e.size()
		w.state.Writes++
	}
}

// dropped counts entries of a batch that were refused for good.
func (w *Writer) dropped(batch []entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range batch {
		w.drop(e)
	}
}
