package expiration

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// Digest is what memory has of a timer that never changes: what it is found by, which is the first bytes of the hash of its token
// and hashes of names, and when its event was accepted. It is stored, so that the start need not read names.
type Digest [digestSize]byte

// Where the numbers stand in a Digest, each of eight bytes but for the token's and the last. The first one says under which key
// the hashes were made: those of another key mean nothing.
const (
	digestKey      = 0
	digestToken    = 8
	digestEvent    = digestToken + index.TokenSize
	digestRoom     = digestEvent + 8
	digestSender   = digestRoom + 8
	digestState    = digestSender + 8
	digestRequest  = digestState + 8
	digestReceived = digestRequest + 8 // in milliseconds
	digestDelayed  = digestReceived + 8
	digestSize     = digestDelayed + 1
)

func (d *Digest) get(at int) uint64 { return binary.BigEndian.Uint64(d[at:]) }

func (d *Digest) set(at int, n uint64) { binary.BigEndian.PutUint64(d[at:], n) }

// Indexed is what the start reads of a timer.
type Indexed struct {
	NID    int64
	Digest Digest // zero if the row has none
	// Claimed says that the timer does not run any more.
	Claimed  bool
	Duration time.Duration
	Deadline time.Time
}

// row returns what memory keeps of it.
func (i Indexed) row() index.Row {
	return index.Row{
		NID: i.NID, Token: [index.TokenSize]byte(i.Digest[digestToken:]),
		Event: i.Digest.get(digestEvent), Room: i.Digest.get(digestRoom), Sender: i.Digest.get(digestSender),
		State: i.Digest.get(digestState), Request: i.Digest.get(digestRequest),
		Received: int64(i.Digest.get(digestReceived)), Delayed: i.Digest[digestDelayed] != 0, Claimed: i.Claimed,
		Duration: i.Duration, Deadline: i.Deadline.UnixMilli(),
	}
}

// newIndexed returns what the start will read of a row.
func newIndexed(row Timer, d Digest) Indexed {
	return Indexed{NID: row.NID, Digest: d, Claimed: row.Claim != nil, Duration: row.Duration, Deadline: row.Deadline}
}

// names makes numbers of names, under a key: nobody without it can find two names with the same number, and by chance
// there are none.
type names struct {
	key []byte
}

// hash returns the number of a name, which is never 0.
func (n names) hash(parts ...string) uint64 {
	data := append(make([]byte, 0, 512), n.key...)
	for _, part := range parts {
		data = append(append(data, part...), 0xff) // which is in no valid string
	}
	sum := sha256.Sum256(data)
	return max(binary.BigEndian.Uint64(sum[:]), 1)
}

// state returns the number of a piece of state.
func (n names) state(s StateKey) uint64 { return n.hash(s.RoomID, s.Type, s.Key) }

// request returns the number of a request.
func (n names) request(h RequestHash) uint64 { return n.hash(string(h[:])) }

// id returns the number of the key itself.
func (n names) id() uint64 { return n.hash() }

// digest returns the digest of a row.
func (n names) digest(row Timer) (d Digest) {
	d.set(digestKey, n.id())
	copy(d[digestToken:], row.TokenHash[:index.TokenSize])
	d.set(digestEvent, n.hash(row.Event.ID))
	d.set(digestRoom, n.hash(row.Event.RoomID))
	d.set(digestSender, n.hash(row.Event.Sender))
	if state, ok := row.Event.State(); ok {
		d.set(digestState, n.state(state))
	}
	d.set(digestReceived, uint64(row.Received.UnixMilli()))
	switch {
	case row.Delayed != nil: // which is found by its request in the database
		d[digestDelayed] = 1
	case row.Event.Request != nil:
		d.set(digestRequest, n.request(row.Event.Request.Hash))
	}
	return d
}
