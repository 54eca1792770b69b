package conntrack

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// From linux/netfilter/nf_tables.h, nfnetlink.h and nf_conntrack_common.h.
const (
	subsysNFTables = 10
	msgBatchBegin  = 0x10
	msgBatchEnd    = 0x11
	msgNewTable    = 0
	msgNewChain    = 3
	msgNewRule     = 6

	tableFlagOwner = 2
	hookLocalIn    = 1
	register1      = 1
	registerResult = 0 // NFT_REG_VERDICT
	ctKeyState     = 0
	stateBit       = 2 // NF_CT_STATE_BIT(IP_CT_ESTABLISHED)
	cmpNotEqual    = 1
	verdictReturn  = -5
	// behind everybody's, though an empty chain is passed without a trace
	holdPriority = 1000
)

// HoldTable is what the name of the native nft table begins with, of family inet, that a Hold is.
// What follows is by chance: who saves a ruleset with it in it, and loads that while there is
// another one, would be refused the whole if both had one name.
const HoldTable = "service-proxy-agent-"

const holdComment = "keeps NAT of established connections on when table nat is flushed"

// holdLimit is for the kernel's answer, which comes at once unless it is held up.
const holdLimit = 5 * time.Second

// Hold keeps connection tracking and NAT on in this network namespace while there is no rule for
// them. The kernel turns both off with the last rule that wants them: `nft flush ruleset`, which is
// the first line of most nftables.conf, or `iptables -t nat -F`. A redirected stream that speaks
// before the rules are back is reset then, since its packets go out with their addresses as
// they are. See docs/design/facts.md#last-rule-turns-nat-off and docs/design/facts.md#owned-table.
//
// It is a table of the nft flag owner: only the process that made it can change it or take it away,
// flush ruleset leaves it, and the kernel deletes it when the process ends. It has a nat chain
// without a rule, which is what keeps NAT on, and a chain that no hook leads to with a rule that
// looks at conntrack, which is what keeps that on. No packet's way depends on it. Hold it for as
// long as it is needed only: it is in what others list.
type Hold struct{ conn *netlink.Conn }

// NewHold makes the table. It fails where the kernel has no nf_tables or is older than 5.12, which
// does not know the flag.
func NewHold() (*Hold, error) {
	batch, err := holdBatch(fmt.Sprintf("%s%08x", HoldTable, rand.Uint32()))
	if err != nil {
		return nil, fmt.Errorf("keep connection tracking on: %w", err)
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("keep connection tracking on: %w", err)
	}
	if err := makeHold(conn, batch); err != nil {
		conn.Close()
		return nil, fmt.Errorf("keep connection tracking on: %w", err)
	}
	return &Hold{conn}, nil
}

func makeHold(conn *netlink.Conn, batch []netlink.Message) error {
	if err := conn.SetDeadline(time.Now().Add(holdLimit)); err != nil {
		return err
	}
	if _, err := conn.SendMessages(batch); err != nil {
		return err
	}
	// The refusal of any message, or the acknowledgement of the one that asks for it. It is one
	// transaction: nothing stays of one that was refused.
	_, err := conn.Receive()
	return err
}

// Close takes the table away: with the socket, the kernel does.
func (h *Hold) Close() error { return h.conn.Close() }

// holdBatch is the transaction that makes this, as nft prints it:
//
//	table inet service-proxy-agent-0a1b2c3d {
//		flags owner
//		chain nat { type nat hook input priority 1000; policy accept; }
//		chain conntrack { ct state established return }
//	}
func holdBatch(table string) ([]netlink.Message, error) {
	b := holdBuilder{}
	b.add(msgBatchBegin, 0, nil)
	b.add(subsysNFTables<<8|msgNewTable, netlink.Create|netlink.Excl,
		func(ae *netlink.AttributeEncoder) error {
			ae.String(1, table)
			ae.Uint32(2, tableFlagOwner)
			// user data: a comment
			ae.Bytes(6, append([]byte{0, byte(len(holdComment) + 1)}, holdComment+"\x00"...))
			return nil
		})
	b.add(subsysNFTables<<8|msgNewChain, netlink.Create, func(ae *netlink.AttributeEncoder) error {
		ae.String(1, table)
		ae.String(3, "nat")
		ae.Nested(4, func(ae *netlink.AttributeEncoder) error {
			ae.Uint32(1, hookLocalIn)
			ae.Uint32(2, holdPriority)
			return nil
		})
		ae.String(7, "nat")
		return nil
	})
	b.add(subsysNFTables<<8|msgNewChain, netlink.Create, func(ae *netlink.AttributeEncoder) error {
		ae.String(1, table)
		ae.String(3, "conntrack")
		return nil
	})
	b.add(subsysNFTables<<8|msgNewRule, netlink.Create|netlink.Append|netlink.Acknowledge,
		func(ae *netlink.AttributeEncoder) error {
			ae.String(1, table)
			ae.String(2, "conntrack")
			ae.Nested(4, establishedReturns)
			return nil
		})
	b.add(msgBatchEnd, 0, nil)
	return b.batch, b.err
}

// establishedReturns are the expressions of "ct state established return".
func establishedReturns(list *netlink.AttributeEncoder) error {
	expression := func(name string, data func(*netlink.AttributeEncoder)) {
		list.Nested(1, func(ae *netlink.AttributeEncoder) error {
			ae.String(1, name)
			ae.Nested(2, func(ae *netlink.AttributeEncoder) error { data(ae); return nil })
			return nil
		})
	}
	// what stands in a register has this machine's order
	value := func(ae *netlink.AttributeEncoder, kind uint16, v uint32) {
		ae.Nested(kind, func(ae *netlink.AttributeEncoder) error {
			ae.Bytes(1, binary.NativeEndian.AppendUint32(nil, v))
			return nil
		})
	}
	expression("ct", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(1, register1)
		ae.Uint32(2, ctKeyState)
	})
	expression("bitwise", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(1, register1)
		ae.Uint32(2, register1)
		ae.Uint32(3, 4)
		value(ae, 4, stateBit)
		value(ae, 5, 0)
	})
	expression("cmp", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(1, register1)
		ae.Uint32(2, cmpNotEqual)
		value(ae, 3, 0)
	})
	expression("immediate", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(1, registerResult)
		ae.Nested(2, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(2, func(ae *netlink.AttributeEncoder) error {
				ae.Int32(1, verdictReturn)
				return nil
			})
			return nil
		})
	})
	return nil
}

// holdBuilder gathers messages. The first error stays in err.
type holdBuilder struct {
	batch []netlink.Message
	err   error
}

func (b *holdBuilder) add(kind uint16, flags netlink.HeaderFlags,
	attributes func(*netlink.AttributeEncoder) error) {
	data := []byte{unix.NFPROTO_INET, 0, 0, 0}
	if attributes == nil {
		data = []byte{unix.AF_UNSPEC, 0, 0, subsysNFTables}
	} else if b.err == nil {
		ae := netlink.NewAttributeEncoder()
		ae.ByteOrder = binary.BigEndian
		if b.err = attributes(ae); b.err == nil {
			var encoded []byte
			encoded, b.err = ae.Encode()
			data = append(data, encoded...)
		}
	}
	b.batch = append(b.batch, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | flags},
		Data:   data})
}
