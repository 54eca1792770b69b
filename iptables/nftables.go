package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What of the kernel's nf_tables interface (linux/netfilter/nf_tables.h, nfnetlink.h) is used here:
// looking only. Every write goes through iptables, whose rules iptables must be able to read back.
const (
	nfnlSubsysNFTables = 10
	nfnlGroupNFTables  = 7 // NFNLGRP_NFTABLES

	nftMsgNewTable = 0
	nftMsgDelTable = 2
	nftMsgNewChain = 3
	nftMsgGetChain = 4
	nftMsgDelChain = 5
	nftMsgNewRule  = 6
	nftMsgDelRule  = 8
	nftMsgNewGen   = 15

	nfgenmsgLen = 4 // family, version, resource id

	nftaTableName     = 1
	nftaChainTable    = 1
	nftaChainName     = 3
	nftaChainHook     = 4
	nftaChainType     = 7
	nftaHookNum       = 1
	nftaHookPriority  = 2
	nftaRuleTable     = 1
	nftaRuleChain     = 2
	nftaGenProcPID    = 2
	nftaGenProcName   = 3
	nfInetPreRouting  = 0
	nfInetLocalOut    = 3
	nfprotoUnspec     = 0
	nfprotoInet       = 1
	interruptedReads  = 20
	watchReceiveBytes = 8 << 20
)

func (f Family) nfproto() byte {
	if f == IPv6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// nftChain is a chain as the kernel lists it, without its rules.
type nftChain struct {
	family      byte
	table, name string
	kind        string // "nat", "filter", "route"; "" for a chain that no hook leads to
	hook        uint32
	priority    int32
}

// natChains are the names of the chains in the nat table of iptables-nft.
func natChains(f Family) ([]string, error) {
	chains, err := nftChains(f.nfproto())
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range chains {
		if c.table == "nat" && c.family == f.nfproto() {
			names = append(names, c.name)
		}
	}
	return names, nil
}

// nftChains lists the chains of a family (0: of all) by netlink, so that the nft program
// need not be installed.
func nftChains(family byte) ([]nftChain, error) {
	conn, err := dialNetfilter()
	if err != nil {
		return nil, fmt.Errorf("list nft chains: %w", err)
	}
	defer conn.Close()
	for range interruptedReads {
		replies, err := conn.Execute(nftRequest(nftMsgGetChain, family, netlink.Request|netlink.Dump))
		// Somebody changed the list while it was read: it may lack a chain. (The dump is
		// short, so this ends soon.)
		if errors.Is(err, unix.EINTR) || slices.ContainsFunc(replies, func(m netlink.Message) bool {
			return m.Header.Flags&netlink.DumpInterrupted != 0
		}) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list nft chains: %w", err)
		}
		chains, err := parseChains(replies)
		if err != nil {
			return nil, fmt.Errorf("list nft chains: %w", err)
		}
		return chains, nil
	}
	return nil, fmt.Errorf("list nft chains: interrupted %d times: %w", interruptedReads,
		ErrCouldNotLook)
}

func parseChains(messages []netlink.Message) ([]nftChain, error) {
	var chains []nftChain
	for _, m := range messages {
		attributes, err := nftAttributes(m)
		if err != nil {
			return nil, err
		}
		c := nftChain{family: m.Data[0]}
		for attributes.Next() {
			switch attributes.Type() {
			case nftaChainTable:
				c.table = attributes.String()
			case nftaChainName:
				c.name = attributes.String()
			case nftaChainType:
				c.kind = attributes.String()
			case nftaChainHook:
				attributes.Nested(func(hook *netlink.AttributeDecoder) error {
					for hook.Next() {
						switch hook.Type() {
						case nftaHookNum:
							c.hook = hook.Uint32()
						case nftaHookPriority:
							c.priority = int32(hook.Uint32())
						}
					}
					return nil
				})
			}
		}
		if err := attributes.Err(); err != nil {
			return nil, err
		}
		chains = append(chains, c)
	}
	return chains, nil
}

func dialNetfilter() (*netlink.Conn, error) {
	return netlink.Dial(unix.NETLINK_NETFILTER, nil)
}

func nftRequest(kind byte, family byte, flags netlink.HeaderFlags) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(nfnlSubsysNFTables<<8 | uint16(kind)),
			Flags: flags},
		Data: []byte{family, 0, 0, 0},
	}
}

// nftAttributes decodes what follows the nfgenmsg header. Numbers are in network order.
func nftAttributes(m netlink.Message) (*netlink.AttributeDecoder, error) {
	if len(m.Data) < nfgenmsgLen {
		return nil, fmt.Errorf("message of %d bytes", len(m.Data))
	}
	d, err := netlink.NewAttributeDecoder(m.Data[nfgenmsgLen:])
	if err != nil {
		return nil, err
	}
	d.ByteOrder = binary.BigEndian
	return d, nil
}
