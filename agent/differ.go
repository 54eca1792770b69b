package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/rulediff"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// differAgain are the pauses before the looks after one that found a difference. A daemon that
// answers may be about to write just what is missing: it follows Envoy within half a second, or
// within some when that has changed all the time (what its questions cost Envoy is limited), and on
// legacy it may see only each 1.5 s what others did.
var differAgain = []time.Duration{
	500 * time.Millisecond, 1500 * time.Millisecond, 3 * time.Second,
}

// Differ says how the kernel's rules differ from those that it should have; with config, a file,
// what that attribute would change. The error is of the file (ErrSettings).
func Differ(ctx context.Context, s Settings, config string) (rulediff.Difference, error) {
	if config != "" {
		other, err := readConfig(config)
		if err != nil {
			return rulediff.Difference{}, err
		}
		return LookAtRules(ctx, s).changes(config, *other), nil
	}
	return steady(ctx, differAgain, func() (rulediff.Difference, bool) {
		l := LookAtRules(ctx, s)
		elsewhere, err := iptables.OtherBackend(ctx, l.Backend)
		if l.Backend == "" {
			err = nil // the families say why
		}
		return l.differs(elsewhere, err), l.Daemon != nil
	}), nil
}

// steady looks until nothing differs, or nobody is there who may be about to put it right, or the
// last pause is over.
func steady(
	ctx context.Context, pauses []time.Duration, look func() (d rulediff.Difference, again bool),
) rulediff.Difference {
	d, again := look()
	for _, pause := range pauses {
		if d.Exit != rulediff.Differs || !again || !sleep(ctx, pause) {
			break
		}
		d, again = look()
	}
	return d
}

// differs compares what the kernel should have with what it has.
func (l Looked) differs(elsewhere []iptables.Elsewhere, elsewhereErr error) rulediff.Difference {
	var parts []rulediff.Family
	o := l.options("what Envoy and the attribute ask for")
	notes := l.daemonNotes()
	paused := l.Daemon != nil && l.Daemon.Paused
	for i, f := range families {
		have, err := l.Have[i], l.HaveErr[i]
		if errors.Is(err, iptables.ErrNoTable) {
			parts = append(parts, rulediff.NotUsable(f, err))
			continue
		}
		if err == nil && !l.Known && !paused {
			err = fmt.Errorf("it is not known what is wanted: %w", l.whyUnknown())
		}
		if err != nil {
			parts = append(parts, rulediff.NotSeen(f, err))
			o.NeedsRoot = o.NeedsRoot || needsRoot(err)
			continue
		}
		left, note := l.left(i)
		if note != "" {
			notes = append(notes, note)
		}
		parts = append(parts, rulediff.Compare(l.Ruleset(i), have, left))
		if held := l.Shapes[i].Held; held != "" && !paused {
			notes = append(notes, fmt.Sprintf("%v: %s", f, held))
		}
	}
	if elsewhereErr != nil {
		notes = append(notes, fmt.Sprintf("the other backend: %v", elsewhereErr))
	}
	o.Notes = notes
	return rulediff.New(parts, others(l.Seen.Others, elsewhere), o)
}

// daemonNotes say what the daemon has to do with it.
func (l Looked) daemonNotes() []string {
	switch {
	case l.Daemon == nil:
		return []string{"no agent answers: compared with what one that starts now would put in"}
	case l.Daemon.Paused:
		return []string{"the agent is paused by cleanup until it is restarted: no rule is wanted"}
	}
	return nil
}

// left are the rules of a family that the kernel does not take, as the daemon says.
func (l Looked) left(i int) (left []rulediff.Left, note string) {
	f, ok := l.daemonFamily(i)
	if !ok {
		return nil, ""
	}
	for _, rule := range f.Left {
		if rule.Rule == iptables.CommentMatch {
			note = fmt.Sprintf("%v: the rules are without their comments, which the kernel does not "+
				"take: %s", families[i], rule.Why)
		}
		left = append(left, rulediff.Left{Rule: rule.Rule, Why: rule.Why})
	}
	return left, note
}

// changes compares what the attribute asks for now with what another one would.
func (l Looked) changes(file string, other attribute.Config) rulediff.Difference {
	o := l.options("what the attribute asks for now")
	o.Config = file
	var parts []rulediff.Family
	wantOther, known := l.wantBy(other)
	if known && !l.Known {
		o.Against = fmt.Sprintf("the rules that the kernel has, since the attribute in force is not "+
			"known (%v)", l.whyUnknown())
	}
	for i, f := range families {
		whole := reconcile.Whole()
		now := reconcile.Shaped(l.Want.Families[i], whole)
		err := l.HaveErr[i]
		switch {
		case !known:
			err = l.whyUnknown()
		case l.Known:
			err = nil
		default:
			now = l.Have[i].Ours()
		}
		if err != nil {
			parts = append(parts, rulediff.NotSeen(f, err))
			o.NeedsRoot = o.NeedsRoot || needsRoot(err)
			continue
		}
		parts = append(parts,
			rulediff.Changes(now, reconcile.Shaped(wantOther.Families[i], whole)))
	}
	return rulediff.New(parts, nil, o)
}

// wantBy is what another attribute would ask for, of the same Envoy.
func (l Looked) wantBy(c attribute.Config) (want Want, known bool) {
	seen := l.Seen
	seen.Attribute = attributeInForce{Known: true, Config: c, Serial: 1}
	if c.InterceptDNS {
		seen.Resolvers = thisVM(seen.Settings.StateDir).resolvers(seen.Settings.ResolverUsers)
	}
	var w wanted
	return w.desired(seen.Settings, seen)
}

func (l Looked) options(against string) rulediff.Options {
	return rulediff.Options{
		Version: l.Seen.Settings.Version, Time: l.Seen.Now, Against: against, Backend: l.Backend,
		Services: len(intercepted(l.Want.Served).services()),
	}
}

// whyUnknown is why it is not known what is wanted.
func (l Looked) whyUnknown() error {
	unseen := func(s symptom.Source, otherwise string) error {
		if why := l.Facts.Unseen[s]; why != errNeedsRoot.Error() {
			return errors.New(cmp.Or(why, otherwise))
		}
		return errNeedsRoot
	}
	switch {
	case l.Seen.User.Err != nil:
		return l.Seen.User.Err
	case l.Seen.Envoy.Err != nil:
		return fmt.Errorf("Envoy: %w", l.Seen.Envoy.Err)
	case l.Seen.Envoy.Generation == 0:
		return fmt.Errorf("Envoy: %w",
			unseen(symptom.FromEnvoy, "it has not told its listeners"))
	case l.Seen.Local == nil:
		return fmt.Errorf("the VM's addresses: %w", unseen(symptom.FromUsers, "they were not read"))
	}
	return cmp.Or(l.Seen.Attribute.Err, l.Seen.Attribute.Source,
		fmt.Errorf("the attribute: %w", unseen(symptom.FromMetadata, "it was not read")))
}

// others are the lines of what is elsewhere: chains that may come before ours, and what an agent
// left in the backend that iptables is not.
func others(chains []iptables.OtherChain, elsewhere []iptables.Elsewhere) (lines []iptables.Line) {
	for _, e := range elsewhere {
		where := fmt.Sprintf("%v in the %s backend, which iptables is not", e.Family, e.Backend)
		for _, name := range e.Chains {
			lines = append(lines, iptables.Line{Mark: iptables.Unwanted, Text: ":" + name, Note: where})
		}
		for _, jump := range e.Jumps {
			lines = append(lines, iptables.Line{Mark: iptables.Unwanted, Text: jump, Note: where})
		}
		chains = append(slices.Clone(chains), e.Others...)
	}
	said := map[string]bool{}
	for _, c := range chains {
		text := c.String()
		if said[text] {
			continue
		}
		said[text] = true
		lines = append(lines, iptables.Line{Mark: iptables.Foreign, Text: text,
			Note: "may take connections before our rules do"})
	}
	return lines
}
