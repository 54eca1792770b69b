// Package page makes one self-contained HTML page of what a look and the daemon know: no external
// asset, no script, and by its Content-Security-Policy no request either. It is pure. Whatever is
// in a text or an attribute is bounded, made printable and escaped where it is written (html.go).
//
// It writes the HTML itself and escapes by html.EscapeString: html/template would add 8.6 MB to the
// program, since its reflection switches the linker's elimination of dead code off.
package page

import (
	"crypto/sha256"
	"encoding/base64"
	"io"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// Content is what the page shows.
type Content struct {
	Time   time.Time // of the look
	Host   string
	Commit string         // of the program; its version is the Report's
	Status *status.Status // nil: the daemon does not answer
	// NoStatus is why it does not.
	NoStatus string
	// Seen is what the look itself saw of Envoy, rules and services: what is shown without a daemon.
	Seen   status.Status
	Report doctor.Report
	// Counts are how many connections each service has got since its rule is there, by the address in
	// status.Service; nil: not known, and NoCounts is why.
	Counts   map[string]Count
	NoCounts string
	// Age is how old what is shown is, where the page is served: a new look may take its time.
	Age time.Duration
	// Live is set where the page is served and not a file: it refreshes itself unless it is Paused,
	// and leads to the explain form.
	Live, Paused bool
}

// Refresh is how often a live page is loaded anew.
const Refresh = 10 * time.Second

// Where a live page leads. The form has a URL of its own: so what is being typed is not lost when
// the overview refreshes itself.
const (
	OverviewPath = "/"
	PausedQuery  = "paused" // the overview with this in its query has Content.Paused
	ExplainPath  = "/explain"
)

// Question is the page with the form, on which one asks what becomes of a connection. The form's
// fields are named To, UID and Direction in lower case.
type Question struct {
	Time      time.Time
	Host      string
	To, UID   string // as they were typed
	Direction string // "outbound" or "inbound"
	// Answer is what `explain` says, in lines; "": nothing was asked yet.
	Answer string
}

// Directions of a Question.
const (
	Outbound = "outbound"
	Inbound  = "inbound"
)

// Render writes the page.
func Render(w io.Writer, c Content) error {
	_, err := io.WriteString(w, "<!DOCTYPE html>\n<html lang=\"en\"><title>"+
		"service-proxy-agent</title><body></body></html>\n")
	return err
}

// RenderQuestion writes the page with the form.
func RenderQuestion(w io.Writer, q Question) error { return Render(w, Content{Live: true}) }

// style is the text between <style> and </style>, word for word.
const style = ""

// StyleHash is the name of the page's style in a Content-Security-Policy that lets in this one and
// no other. So there is one <style>, and no style attribute.
func StyleHash() string {
	sum := sha256.Sum256([]byte(style))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}
