package cloudlog

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// maxAnswer is as much as is read of an answer: {}, or an error with a sentence for each entry.
const maxAnswer = 64 << 10

// dial makes the way to the server. Keep-alive is for a story of several requests; a proxy gets no
// token in plain text.
func dial() http.RoundTripper {
	t := &http.Transport{
		Proxy: func(req *http.Request) (*url.URL, error) {
			if req.URL.Scheme != "https" {
				return nil, nil
			}
			return http.ProxyFromEnvironment(req)
		},
		DialContext:            (&net.Dialer{Timeout: requestLimit}).DialContext,
		MaxResponseHeaderBytes: maxAnswer,
		DisableCompression:     true, // or a short answer may be a long one
		IdleConnTimeout:        time.Minute,
	}
	if pool, err := authorities.Pool(""); err == nil { // else Go looks for itself
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return t
}

// hangUp ends the connections; the next request makes new ones.
func (w *Writer) hangUp() {
	if w.run.client != nil {
		w.run.client.CloseIdleConnections()
		w.run.client = nil
	}
}

// write makes one request. Errors: *answerError, and whatever keeps it from an answer.
func (w *Writer) write(ctx context.Context, batch []entry) error {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	token, err := w.accessToken(ctx)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url,
		bytes.NewReader(w.run.vm.request(batch)))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	if w.run.client == nil {
		w.run.client = &http.Client{
			Transport:     w.dial(),
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	}
	resp, err := w.run.client.Do(req)
	if err != nil {
		return noAnswer(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return noAnswer(err)
	}
	return judge(resp.StatusCode, resp.Header, body, time.Now())
}

// noAnswer is the error of a request that got none.
func noAnswer(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return errors.New("write entries: no answer in time")
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // the URL says nothing new
	}
	return fmt.Errorf("write entries: %s", redaction.Secrets(err.Error()))
}

// request is the body of entries:write:
// https://cloud.google.com/logging/docs/reference/v2/rest/v2/entries/write
func (v *vm) request(batch []entry) []byte {
	entries := make([]json.RawMessage, len(batch))
	for i, e := range batch {
		entries[i] = e.text
	}
	type resource struct {
		Type   string            `json:"type"`
		Labels map[string]string `json:"labels"`
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	err := enc.Encode(struct {
		LogName  string            `json:"logName"`
		Resource resource          `json:"resource"`
		Labels   map[string]string `json:"labels"`
		// an entry that cannot be taken must not take others along
		PartialSuccess bool              `json:"partialSuccess"`
		Entries        []json.RawMessage `json:"entries"`
	}{
		"projects/" + v.project + "/logs/service-proxy-agent",
		resource{"gce_instance", map[string]string{
			"project_id": v.project, "zone": v.zone, "instance_id": v.id}},
		v.labels, true, entries,
	})
	if err != nil {
		panic(err) // strings always marshal, and entries are JSON
	}
	return body.Bytes()
}

// answerError is an answer that is no success.
type answerError struct {
	code  int
	text  string        // its own words
	after time.Duration // Retry-After; 0: not told
	// the entries that were refused for good, by their places in the request, where the others were
	// written; empty: none was
	bad map[int]bool
}

func (e *answerError) Error() string {
	return fmt.Sprintf("write entries: status %d %s: %s", e.code, http.StatusText(e.code), e.text)
}

// split parts a batch into what was written and what was refused for good.
func (e *answerError) split(batch []entry) (good, bad []entry) {
	for i, one := range batch {
		if e.bad[i] {
			bad = append(bad, one)
		} else {
			good = append(good, one)
		}
	}
	if len(bad) == 0 {
		return nil, batch
	}
	return good, bad
}

// judge says what an answer means: nil, or an *answerError.
func judge(code int, header http.Header, body []byte, now time.Time) error {
	if code == http.StatusOK {
		// Of another server, or a proxy's page for people to sign in: those who wrote nothing.
		var answer map[string]json.RawMessage
		if err := json.Unmarshal(body, &answer); err != nil || answer == nil {
			return &answerError{code: code, text: "the answer is not Cloud Logging's"}
		}
		return nil
	}
	e := &answerError{code: code, after: retryAfter(header, now)}
	// google.logging.v2.WriteLogEntriesPartialErrors:
	// https://cloud.google.com/logging/docs/reference/v2/rpc/google.logging.v2
	var answer struct {
		Error struct {
			Message string `json:"message"`
			Details []struct {
				LogEntryErrors map[string]json.RawMessage `json:"logEntryErrors"`
			} `json:"details"`
		} `json:"error"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		e.text = "the answer is not Cloud Logging's"
		return e
	}
	e.text = guestattr.OneLine(redaction.Secrets(answer.Error.Message), 300)
	for _, d := range answer.Error.Details {
		for place := range d.LogEntryErrors {
			if i, err := strconv.Atoi(place); err == nil && i >= 0 && i < maxEntries {
				if e.bad == nil {
					e.bad = map[int]bool{}
				}
				e.bad[i] = true
			}
		}
	}
	return e
}

// retryAfter is how long the server asks to be left alone, up to maxTold; 0: it does not say.
func retryAfter(header http.Header, now time.Time) time.Duration {
	text := header.Get("Retry-After")
	if seconds, err := strconv.ParseUint(text, 10, 32); err == nil {
		return min(time.Duration(seconds)*time.Second, maxTold)
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	if date, err := http.ParseTime(header.Get("Date")); err == nil {
		now = date // this VM's clock may be wrong
	}
	return min(max(at.Sub(now), 0), maxTold)
}
