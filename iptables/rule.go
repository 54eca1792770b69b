package iptables

import (
	"net/netip"
	"strconv"
	"strings"
)

// parsed is a rule taken apart as far as the walk needs it. Whatever it does not know sets unknown:
// such a rule may or may not match.
type parsed struct {
	unknown bool

	proto      string // "", "tcp", "udp", or another name or number
	protoNot   bool
	src, dst   addressMatch
	in, out    interfaceMatch
	dports     []PortRange
	dportsNot  bool
	hasDports  bool
	syn        bool // --syn, or `! --tcp-flags FIN,SYN,RST,ACK SYN` with synNot
	synNot     bool
	uid, gid   *idRange
	dstLocal   bool
	dstLocNot  bool
	states     []string // of conntrack: NEW, ESTABLISHED, DNAT, …
	statesNot  bool
	hasStates  bool
	comment    string
	target     string // "" for a rule that only counts
	goTo       bool   // -g instead of -j
	toPorts    string // --to-ports of REDIRECT
	targetArgs []string
}

type addressMatch struct {
	prefix netip.Prefix // invalid: any
	not    bool
}

type interfaceMatch struct {
	name string
	not  bool
}

type idRange struct {
	first, last uint32
	not         bool
}

// parseRule takes apart what follows "-A CHAIN " in a save. It never fails: what it cannot read
// makes the rule unknown.
func parseRule(spec string) parsed {
	var p parsed
	words, ok := splitWords(spec)
	if !ok {
		p.unknown = true
	}
	not := false
	for len(words) > 0 {
		word := words[0]
		words = words[1:]
		if word == "!" {
			not = true
			continue
		}
		words = p.option(word, not, words)
		not = false
	}
	return p
}

// option takes one option with its values, which are the first of the words that follow it,
// and returns those left.
func (p *parsed) option(word string, not bool, words []string) []string {
	value := func() string {
		if len(words) == 0 {
			p.unknown = true
			return ""
		}
		v := words[0]
		words = words[1:]
		return v
	}
	switch word {
	case "-p", "--protocol":
		p.proto, p.protoNot = protocolName(value()), not
		if p.proto == "all" {
			p.proto, p.unknown = "", p.unknown || not
		}
	case "-s", "--source", "--src":
		p.src = p.address(value(), not)
	case "-d", "--destination", "--dst":
		p.dst = p.address(value(), not)
	case "-i", "--in-interface":
		p.in = interfaceMatch{value(), not}
	case "-o", "--out-interface":
		p.out = interfaceMatch{value(), not}
	case "-m", "--match":
		switch value() {
		case "tcp", "udp", "owner", "comment", "addrtype", "multiport", "conntrack", "state":
		default:
			p.unknown = true
		}
	case "--comment":
		p.comment = value()
	case "--dport", "--destination-port", "--dports", "--destination-ports":
		p.ports(value(), not)
	case "--syn":
		p.syn, p.synNot = true, not
	case "--tcp-flags":
		mask, set := value(), value()
		if mask == "FIN,SYN,RST,ACK" && set == "SYN" {
			p.syn, p.synNot = true, not
		} else {
			p.unknown = true
		}
	case "--uid-owner":
		p.uid = p.id(value(), not)
	case "--gid-owner":
		p.gid = p.id(value(), not)
	case "--dst-type":
		if value() == "LOCAL" {
			p.dstLocal, p.dstLocNot = true, not
		} else {
			p.unknown = true
		}
	case "--ctstate", "--state":
		p.states, p.statesNot, p.hasStates = strings.Split(value(), ","), not, true
	case "-j", "--jump", "-g", "--goto":
		p.goTo = word == "-g" || word == "--goto"
		p.target = value()
		p.targetArgs = words // all that follow
		for k := 0; k+1 < len(words); k++ {
			if words[k] == "--to-ports" || words[k] == "--to-port" {
				p.toPorts = words[k+1]
			}
		}
		return nil
	case "-c", "--set-counters":
		value()
		value()
	default:
		p.unknown = true
	}
	return words
}

func (p *parsed) address(s string, not bool) addressMatch {
	if !strings.Contains(s, "/") {
		if a, err := netip.ParseAddr(s); err == nil {
			return addressMatch{netip.PrefixFrom(a, a.BitLen()), not}
		}
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil { // a name, or a mask with holes
		p.unknown = true
		return addressMatch{}
	}
	return addressMatch{prefix.Masked(), not}
}

func (p *parsed) ports(s string, not bool) {
	p.hasDports, p.dportsNot = true, not
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(part, ":")
		if !isRange {
			last = first
		}
		if first == "" {
			first = "0"
		}
		if last == "" {
			last = "65535"
		}
		a, err1 := strconv.ParseUint(first, 10, 16)
		b, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil { // a name
			p.unknown, p.hasDports, p.dports = true, false, nil
			return
		}
		p.dports = append(p.dports, PortRange{uint16(a), uint16(b)})
	}
}

func (p *parsed) id(s string, not bool) *idRange {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, err1 := strconv.ParseUint(first, 10, 32)
	b, err2 := strconv.ParseUint(last, 10, 32)
	// a name: resolving it is not worth a look-up in the middle of a pass
	if err1 != nil || err2 != nil {
		p.unknown = true
		return nil
	}
	return &idRange{uint32(a), uint32(b), not}
}

func protocolName(s string) string {
	switch s {
	case "6":
		return "tcp"
	case "17":
		return "udp"
	case "0":
		return "all"
	}
	return s
}

// splitWords splits a rule as xtables does: words between blanks, double quotes around
// words that hold some, a backslash before a quote or a backslash inside. It says false
// when a quote is left open.
func splitWords(s string) ([]string, bool) {
	var words []string
	var word strings.Builder
	open, inWord := false, false
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && open && i+1 < len(s):
			i++
			word.WriteByte(s[i])
		case c == '"':
			open, inWord = !open, true
		case (c == ' ' || c == '\t') && !open:
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, !open
}

// target returns the chain or extension that a rule jumps or goes to, "" if it has none. It is the
// cheap part of parseRule: for each rule of a large save only this is asked.
func target(spec string) string {
	// A comment can hold " -j ": only then is the full parse needed.
	if strings.ContainsRune(spec, '"') {
		return parseRule(spec).target
	}
	for _, flag := range []string{"-j ", "-g "} {
		i := strings.LastIndex(spec, flag)
		if i > 0 && spec[i-1] != ' ' || i < 0 {
			continue
		}
		name, _, _ := strings.Cut(spec[i+len(flag):], " ")
		return name
	}
	return ""
}
