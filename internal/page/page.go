// Package page makes one self-contained HTML page of what a look and the daemon know: no external
// asset, no script. It is pure. What others wrote (names, lines of a log) is escaped here.
//
// It writes the HTML itself and escapes by html.EscapeString: html/template would add 8.6 MB to the
// program, since its reflection switches the linker's elimination of dead code off.
package page

import (
	"errors"
	"io"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// Content is what the page shows.
type Content struct {
	Time     time.Time // of the look
	Host     string
	Status   *status.Status // nil: the daemon does not answer
	NoStatus string         // why not
	Report   doctor.Report
	// Counters are how many connections each service has got since its rule is there, by the address
	// in status.Service; nil: not known.
	Counters map[string]uint64
	// Live is set where the page is served and not a file: it refreshes itself, and has the form.
	Live bool
	// Question and Answer are of the form; Question is what was typed.
	Question, Answer string
}

// Render writes the page.
func Render(io.Writer, Content) error { return errors.New("not written yet") }
