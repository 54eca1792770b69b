package main

import (
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// The pages of the manual are made of what the commands say about themselves, here and not in the
// program: it needs none of it. man(7) is the language: every man(1) and mandoc(1) knows it.

// manDate is the day on which what the pages say last changed, moved by hand: the same commands
// make the same pages. mandoc -T lint wants one.
const manDate = "2026-11-30"

// manFiles are what the page of the whole lists.
var manFiles = []struct{ path, what string }{
	{"/etc/default/service-proxy-agent", "The daemon's settings, for systemd's EnvironmentFile=: a " +
		"line SERVICE_PROXY_AGENT_FLAG=VALUE for a flag of service-proxy-agent-run(8). Commands that " +
		"look at the VM read it, too."},
	{"/etc/service-proxy-agent/envoy.json", "Envoy's configuration, which bootstrap writes."},
	{"/etc/service-proxy-agent/owner.json", "Whose that is: Envoy does not start with the " +
		"configuration of a VM whose disk this one's is a copy of."},
	{"/usr/local/bin/service-proxy-agent", "The program."},
	{"/usr/local/bin/envoy", "Envoy, where bootstrap has installed it."},
	{"/usr/local/lib/service-proxy-agent", "The Envoy that came with the release, and what the last " +
		"upgrade has replaced."},
	{"/usr/local/lib/systemd/system", "The units: service-proxy-agent.service is the daemon, " +
		"service-proxy-envoy.service Envoy, and service-proxy-ready.target is reached when the mesh is " +
		"ready."},
	{"/usr/local/share", "This manual, and what completes command lines in bash, zsh and fish."},
	{"/var/lib/service-proxy-agent", "What the daemon and bootstrap keep over a restart."},
	{"/run/service-proxy-agent", "The daemon's socket, which answers root only."},
	{"/var/log/envoy", "Envoy's log files."},
}

// manPages are all pages, by file name.
func manPages(root *cobra.Command) map[string]string {
	pages := map[string]string{root.Name() + ".8": manPage(root, root)}
	for _, c := range visible(root) {
		pages[root.Name()+"-"+c.Name()+".8"] = manPage(root, c)
	}
	return pages
}

func manPage(root, c *cobra.Command) string {
	p := manual{}
	name := pageName(c)
	about := says(c)
	p.WriteString(".TH " + strings.ToUpper(name) + " 8 " + manDate + " " + root.Name() +
		" Manual\n")
	// No word is broken: names have hyphens, and are there to be copied.
	p.macro("nh")
	p.macro("ad", "l")
	p.macro("SH", "NAME")
	p.line(roff(name) + ` \- ` + roff(strings.ToLower(c.Short[:1])+c.Short[1:]))
	p.macro("SH", "SYNOPSIS")
	p.line(synopsis(useLine(c)))
	p.macro("SH", "DESCRIPTION")
	for i, text := range about.text {
		if i > 0 {
			p.macro("PP")
		}
		p.line(marked(text))
	}
	if c == root {
		p.commands(root)
	}
	p.options(c)
	p.exits(about)
	p.environment(c)
	p.files(root, c)
	p.examples(c)
	p.macro("SH", "SEE ALSO")
	p.seeAlso(root, c)
	return p.String()
}

func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

type manual struct{ strings.Builder }

// macro writes a request; arguments that need it are quoted.
func (p *manual) macro(name string, args ...string) {
	p.WriteString("." + name)
	for _, arg := range args {
		p.WriteString(" " + quoted(roff(arg)))
	}
	p.WriteByte('\n')
}

func quoted(arg string) string {
	if arg == "" || strings.ContainsAny(arg, " \t") {
		return `"` + strings.ReplaceAll(arg, `"`, `\(dq`) + `"`
	}
	return arg
}

// line writes what is roff already, a sentence a line, as man pages are written.
func (p *manual) line(text string) {
	for sentence := range strings.SplitSeq(sentenceEnd.ReplaceAllString(text, "$1\n"), "\n") {
		if strings.HasPrefix(sentence, ".") || strings.HasPrefix(sentence, "'") {
			sentence = `\&` + sentence
		}
		p.WriteString(sentence + "\n")
	}
}

var sentenceEnd = regexp.MustCompile(`([a-z)\]][.?!]) +`)

// roff is a text as it is printed, with a minus where a hyphen would not do in a command.
func roff(text string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", `\&...`, "–", `\(en`).Replace(text)
}

var (
	code = regexp.MustCompile("`[^`]+`")
	// literal is a flag or a file, reference another page.
	literal = regexp.MustCompile(
		`(^|[ (])(--?[a-z][a-z-]*\b|(?:https:/|/etc|/usr|/var|/run|/dev)/[\w./-]*\w)`)
	reference = regexp.MustCompile(`([a-z][a-z-]*)\((\d)\)`)
)

// marked is a paragraph in man(7): what is to be typed is bold.
func marked(text string) string {
	var b strings.Builder
	for text != "" {
		at := code.FindStringIndex(text)
		if at == nil {
			at = []int{len(text), len(text)}
		}
		plain := literal.ReplaceAllString(text[:at[0]], `$1`+"\x00$2\x01")
		plain = reference.ReplaceAllString(plain, "\x00$1\x01($2)")
		b.WriteString(strings.NewReplacer("\x00", `\fB`, "\x01", `\fP`).Replace(roff(plain)))
		if at[1] > at[0] {
			b.WriteString(`\fB` + roff(text[at[0]+1:at[1]-1]) + `\fP`)
		}
		text = text[at[1]:]
	}
	return b.String()
}

// synopsis has the words to type bold and those to replace in italics.
func synopsis(use string) string {
	var all []string
	for _, word := range strings.Fields(use) {
		bare := strings.Trim(word, "[]")
		font := `\fB`
		if bare == "flags" || strings.ToUpper(bare) == bare {
			font = `\fI`
		}
		all = append(all, strings.Replace(roff(word), roff(bare), font+roff(bare)+`\fP`, 1))
	}
	return strings.Join(all, " ")
}

func (p *manual) commands(root *cobra.Command) {
	p.macro("SH", "COMMANDS")
	p.line("Each has a page of its own.")
	for _, group := range root.Groups() {
		p.macro("SS", strings.TrimSuffix(group.Title, ":"))
		for _, c := range visible(root) {
			if c.GroupID == group.ID {
				p.macro("TP")
				p.line(`\fB` + roff(pageName(c)) + `\fP(8)`)
				p.line(marked(c.Short + "."))
			}
		}
	}
}

func (p *manual) options(c *cobra.Command) {
	own, daemons := flagsOf(c)
	p.macro("SH", "OPTIONS")
	p.flags(own)
	if daemons.HasAvailableFlags() {
		p.macro("SS", "Where to look")
		p.line(marked("By default these are what the daemon's are, by /etc/default/service-proxy-agent."))
		p.flags(daemons)
	}
}

func (p *manual) flags(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := `\fB` + roff("--"+f.Name) + `\fP`
		if f.Shorthand != "" {
			name = `\fB` + roff("-"+f.Shorthand) + `\fP, ` + name
		}
		switch {
		case value != "" && f.NoOptDefVal != "":
			name += `[=\fI` + roff(value) + `\fP]`
		case value != "":
			name += ` \fI` + roff(value) + `\fP`
		}
		p.macro("TP")
		p.line(name)
		text := marked(strings.ToUpper(usage[:1]) + usage[1:] + ".")
		if value != "" {
			text = regexp.MustCompile(`\b`+regexp.QuoteMeta(roff(value))+`\b`).
				ReplaceAllLiteralString(text, `\fI`+roff(value)+`\fP`)
		}
		p.line(text)
		if byDefault := strings.Trim(f.DefValue, "[]"); byDefault != "" && byDefault != "false" &&
			byDefault != "0s" && byDefault != "0" {
			p.line(`The default is \fB` + roff(byDefault) + `\fP.`)
		}
	})
}

func (p *manual) exits(about said) {
	p.macro("SH", "EXIT STATUS")
	if _, more, found := strings.Cut(about.exitTitle, ", "); found {
		p.line(marked(strings.ToUpper(more[:1]) + more[1:] + ":"))
	}
	for _, e := range about.exits {
		p.macro("TP", "4")
		p.line(`\fB` + e.code + `\fP`)
		p.line(marked(strings.ToUpper(e.meaning[:1]) + e.meaning[1:] + "."))
	}
}

func (p *manual) environment(c *cobra.Command) {
	p.macro("SH", "ENVIRONMENT")
	item := func(name, text string) {
		p.macro("TP")
		p.line(name)
		p.line(marked(text))
	}
	item(`\fBSERVICE_PROXY_AGENT_\fP\fIFLAG\fP`, "The value of a flag that is not given, for "+
		"each flag: SERVICE_PROXY_AGENT_ENVOY_ADMIN is that of --envoy-admin.")
	item(`\fBNO_COLOR\fP`, "No colour, even on a terminal, where this is set to anything.")
	item(`\fBCOLUMNS\fP`, "How wide lines may be, instead of as wide as the terminal and at most 100.")
	if _, daemons := flagsOf(c); daemons.HasAvailableFlags() || slices.Contains(
		[]string{"run", "bootstrap", "service-proxy-agent"}, c.Name()) {
		item(`\fBGCE_METADATA_HOST\fP`, "The metadata server, instead of Compute Engine's.")
	}
}

func (p *manual) files(root, c *cobra.Command) {
	all := manFiles
	switch _, daemons := flagsOf(c); {
	case c == root:
	case daemons.HasAvailableFlags() || c.Name() == "run":
		all = all[:1]
	default:
		p.macro("SH", "FILES")
		p.line(marked("service-proxy-agent(8) lists them."))
		return
	}
	p.macro("SH", "FILES")
	for _, f := range all {
		p.macro("TP")
		p.line(`\fI` + roff(f.path) + `\fP`)
		p.line(marked(f.what))
	}
}

func (p *manual) examples(c *cobra.Command) {
	p.macro("SH", "EXAMPLES")
	p.macro("EX")
	for line := range strings.SplitSeq(strings.Trim(c.Example, "\n"), "\n") {
		p.WriteString(roff(strings.TrimPrefix(line, "  ")) + "\n")
	}
	p.macro("EE")
	p.macro("nh") // which EE has ended, in groff
}

func (p *manual) seeAlso(root, c *cobra.Command) {
	var pages []string
	add := func(name, section string) { pages = append(pages, `\fB`+roff(name)+`\fP(`+section+`)`) }
	if c != root {
		add(root.Name(), "8")
	}
	for _, other := range visible(root) {
		if other != c {
			add(pageName(other), "8")
		}
	}
	for _, name := range []string{"iptables", "iptables-save"} {
		if c == root {
			add(name, "8")
		}
	}
	p.line(strings.Join(pages, ",\n"))
	p.macro("PP")
	p.macro("UR", symptom.DocsURL+"README.md")
	p.line("All pages")
	p.macro("UE")
}
