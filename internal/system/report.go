package system

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// Schema names the form of a Report in JSON. Fields may be added to it.
const Schema = "service-proxy-agent/check/v1"

// Report is what `bootstrap --check` says.
type Report struct {
	Schema  string  `json:"schema"`
	System  string  `json:"system"`
	Exit    int     `json:"exit"` // 0: works, perhaps with limits; 1: refused
	Verdict Verdict `json:"verdict"`
	Rows    []Row   `json:"rows"`
}

// New makes a Report of what was seen.
func New(s System) Report {
	r := Report{Schema: Schema, System: s.Title(), Verdict: Works, Rows: Judge(s)}
	for _, row := range r.Rows {
		// What is not known is no limit.
		if row.Verdict != Unknown && slices.Index(order, row.Verdict) > slices.Index(order, r.Verdict) {
			r.Verdict = row.Verdict
		}
	}
	if r.Verdict == Refused {
		r.Exit = exitcode.No
	}
	return r
}

// JSON is the report for programs.
func (r Report) JSON() ([]byte, error) {
	text, err := json.MarshalIndent(r, "", "  ")
	return append(text, '\n'), err
}

// Text writes the report for people: the verdict, then a line for each row, and below those that
// are limited or refused what is amiss and what to do.
func (r Report) Text(w io.Writer, style terminal.Style, width int) error {
	colour := map[Verdict]func(string) string{Works: style.Good, Unknown: style.Dim,
		Limited: style.Warn, Refused: style.Bad}
	var b strings.Builder
	line := func(indent int, format string, args ...any) {
		b.WriteString(terminal.Wrap(fmt.Sprintf(format, args...)+"\n", width, indent))
	}
	verdict := map[Verdict]string{Works: "works here", Limited: "works here, with limits",
		Refused: "does not work here"}[r.Verdict]
	// A colour that is broken would go on after the end of its line.
	verdict = strings.ReplaceAll(verdict, " ", terminal.NoBreak)
	line(2, "%s: %s\n", r.System, colour[r.Verdict](verdict))
	const left = len(Refused) + 2
	for _, row := range r.Rows {
		line(left+whatWidth, "%s%s%-*s%s", colour[row.Verdict](string(row.Verdict)),
			strings.Repeat(" ", left-len(row.Verdict)), whatWidth, row.What, row.Seen)
		if row.Verdict == Works {
			continue
		}
		for _, more := range []struct{ name, text string }{
			{"needed", row.Needed}, {"lacks", row.Lacks}, {"way out", row.WayOut},
		} {
			if more.text != "" && more.text != "any" {
				line(whatWidth, "%*s%s%s%s", left, "", style.Dim(more.name),
					strings.Repeat(" ", whatWidth-len(more.name)), more.text)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// whatWidth is the width of what stands before what was seen.
const whatWidth = 14
