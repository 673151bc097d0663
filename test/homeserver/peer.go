package homeserver

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// Peer is a hostile homeserver, with just enough functions for that: it has a key, joins rooms, and sends any event. It answers requests
// for its key. Any other request hangs.
type Peer struct {
	Name spec.ServerName
	// UserID is the peer's only user.
	UserID string

	key    ed25519.PrivateKey
	client fclient.FederationClient
	server *http.Server
	closed chan struct{}
	asked  atomic.Int64
}

// peerKey is the ID of a peer's key.
const peerKey gomatrixserverlib.KeyID = "ed25519:peer"

// PeerRoom is a room that a peer has joined.
type PeerRoom struct {
	ID string

	server  spec.ServerName
	version gomatrixserverlib.IRoomVersion
	auth    []string // the IDs of the events that allow the peer's user to send messages
	depth   int64
}

// NewPeer starts a peer on a loopback address, and writes its certificate into dir. The caller must close the peer.
func NewPeer(host, dir string, a *Authority) (*Peer, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	certFile, keyFile := filepath.Join(dir, "peer_cert.pem"), filepath.Join(dir, "peer_key.pem")
	if err = a.issue(host, certFile, keyFile); err != nil {
		return nil, err
	}
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	l, err := tls.Listen("tcp", net.JoinHostPort(host, "0"), &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		return nil, err
	}
	p := &Peer{Name: spec.ServerName(l.Addr().String()), key: key, closed: make(chan struct{})}
	p.UserID = "@mallory:" + string(p.Name)
	p.client = fclient.NewFederationClient(
		[]*fclient.SigningIdentity{{ServerName: p.Name, KeyID: peerKey, PrivateKey: key}},
		fclient.WithSkipVerify(true), fclient.WithTimeout(time.Minute),
	)
	p.server = &http.Server{Handler: http.HandlerFunc(p.answer)}
	go func() { _ = p.server.Serve(l) }()
	return p, nil
}

// Close stops the peer, and ends the hanging requests.
func (p *Peer) Close() error {
	close(p.closed)
	return p.server.Close()
}

// Asked returns the number of requests that the peer does not answer.
func (p *Peer) Asked() int { return int(p.asked.Load()) }

func (p *Peer) answer(w http.ResponseWriter, req *http.Request) {
	if !strings.HasPrefix(req.URL.Path, "/_matrix/key/v2/server") {
		p.asked.Add(1)
		select {
		case <-p.closed:
		case <-req.Context().Done():
		}
		return
	}
	keys, err := json.Marshal(gomatrixserverlib.ServerKeyFields{
		ServerName: p.Name, ValidUntilTS: spec.AsTimestamp(time.Now().Add(validity)),
		VerifyKeys: map[gomatrixserverlib.KeyID]gomatrixserverlib.VerifyKey{
			peerKey: {Key: spec.Base64Bytes(p.key.Public().(ed25519.PublicKey))},
		},
		OldVerifyKeys: map[gomatrixserverlib.KeyID]gomatrixserverlib.OldVerifyKey{},
	})
	if err == nil {
		keys, err = gomatrixserverlib.SignJSON(string(p.Name), peerKey, p.key, keys)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(keys)
}

// Post sends a signed request to a server.
func (p *Peer) Post(ctx context.Context, server, path string, body any) (Response, error) {
	signed := fclient.NewFederationRequest(http.MethodPost, p.Name, spec.ServerName(server), path)
	if err := errors.Join(signed.SetContent(body), signed.Sign(p.Name, peerKey, p.key)); err != nil {
		return Response{}, err
	}
	req, err := signed.HTTPRequest()
	if err != nil {
		return Response{}, err
	}
	res, err := fclient.NewClient(fclient.WithSkipVerify(true)).DoHTTPRequest(ctx, req)
	if err != nil {
		return Response{}, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	return Response{Code: res.StatusCode, Header: res.Header, Body: data}, err
}

// Join joins a public room of a server.
func (p *Peer) Join(ctx context.Context, server, roomID string) (*PeerRoom, error) {
	made, err := p.client.MakeJoin(ctx, p.Name, spec.ServerName(server), roomID, p.UserID)
	if err != nil {
		return nil, fmt.Errorf("make_join: %w", err)
	}
	version, err := gomatrixserverlib.GetRoomVersion(made.RoomVersion)
	if err != nil {
		return nil, err
	}
	join, err := version.NewEventBuilderFromProtoEvent(&made.JoinEvent).Build(time.Now(), p.Name, peerKey, p.key)
	if err != nil {
		return nil, fmt.Errorf("building the join: %w", err)
	}
	res, err := p.client.SendJoin(ctx, p.Name, spec.ServerName(server), join)
	if err != nil {
		return nil, fmt.Errorf("send_join: %w", err)
	}
	room := &PeerRoom{
		ID: roomID, server: spec.ServerName(server), version: version, auth: []string{join.EventID()}, depth: join.Depth(),
	}
	for _, e := range res.StateEvents.UntrustedEvents(made.RoomVersion) {
		if t := e.Type(); t == spec.MRoomCreate || t == spec.MRoomPowerLevels {
			room.auth = append(room.auth, e.EventID())
		}
	}
	return room, nil
}

// SendUponNothing sends a message to each of the rooms, which must be rooms of one server. The prev event of each message does not exist.
// The server asks the peer for it, and the room waits until the peer answers.
func (p *Peer) SendUponNothing(ctx context.Context, rooms ...*PeerRoom) error {
	var id [32]byte
	txn := gomatrixserverlib.Transaction{Origin: p.Name, Destination: rooms[0].server, OriginServerTS: spec.AsTimestamp(time.Now())}
	for _, room := range rooms {
		_, _ = rand.Read(id[:])
		e, err := room.version.NewEventBuilderFromProtoEvent(&gomatrixserverlib.ProtoEvent{
			SenderID: p.UserID, RoomID: room.ID, Type: "m.room.message", Depth: room.depth + 10,
			PrevEvents: []string{"$" + base64.RawURLEncoding.EncodeToString(id[:])}, AuthEvents: room.auth,
			Content: spec.RawJSON(`{"msgtype":"m.text","body":"wait for me"}`),
		}).Build(time.Now(), p.Name, peerKey, p.key)
		if err != nil {
			return fmt.Errorf("building a message: %w", err)
		}
		txn.PDUs = append(txn.PDUs, e.JSON())
	}
	txn.TransactionID = gomatrixserverlib.TransactionID(base64.RawURLEncoding.EncodeToString(id[:]))
	res, err := p.client.SendTransaction(ctx, txn)
	if err != nil {
		return fmt.Errorf("sending a transaction: %w", err)
	}
	for eventID, result := range res.PDUs {
		if result.Error != "" {
			return fmt.Errorf("%s: %s", eventID, result.Error)
		}
	}
	return nil
}
