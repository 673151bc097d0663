package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
	"maunium.net/go/mautrix/synapseadmin"
)

// member is the state event that says that its sender is in the call.
var member = event.Type{Type: "m.call.member", Class: event.StateEventType}

const (
	// life is the life time of the event that expires, in seconds.
	life = 3
	// keepAlives is how many times alice refreshes the event, once a second.
	keepAlives = 5
	// patience limits how late an event may arrive.
	patience = 10 * time.Second
)

// story is a call, seen by each of its participants.
type story struct {
	screen  *screen
	server  string
	secret  string
	suffix  string
	room    id.RoomID
	bobSees chan *event.Event
}

// participant is a user in the call.
type participant struct {
	name   string
	client *mautrix.Client
}

// sent is the answer to the send of an expiring event.
type sent struct {
	EventID id.EventID `json:"event_id"`
	Token   string     `json:"expire_refresh_token"`
}

func (s *story) play(ctx context.Context) error {
	var alice, bob, carol, dave *participant
	if err := s.screen.during("alice, bob, carol and dave come together", func() (err error) {
		for name, p := range map[string]**participant{"alice": &alice, "bob": &bob, "carol": &carol, "dave": &dave} {
			if *p, err = s.register(ctx, name); err != nil {
				return fmt.Errorf("registering %s: %w", name, err)
			}
		}
		return s.meet(ctx, alice, bob, carol, dave)
	}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.follow(ctx, bob); err != nil {
		return err
	}
	s.screen.restart()
	for _, scene := range []struct {
		title string
		play  func() error
	}{
		{"alice joins the call, keeps her event alive, and crashes", func() error { return s.crash(ctx, alice) }},
		{"carol's SFU holds her token, and says that she is gone", func() error { return s.end(ctx, carol) }},
		{"dave replaces his state: the old token is worth nothing", func() error { return s.replace(ctx, dave) }},
	} {
		s.screen.title(scene.title)
		if err := scene.play(); err != nil {
			return fmt.Errorf("%s: %w", scene.title, err)
		}
	}
	s.screen.title("Everything was as the contract says.")
	return nil
}

// crash: the event runs as long as it is refreshed, and expires after that.
func (s *story) crash(ctx context.Context, alice *participant) error {
	joined, running, err := s.join(ctx, alice, life)
	if err != nil {
		return err
	}
	if err = s.screen.event("the running event, as bob's server sent it:", running); err != nil {
		return err
	}
	var lastKeepAlive time.Time
	for range keepAlives {
		if err = s.expectSilence(ctx, time.Second); err != nil {
			return err
		}
		lastKeepAlive = time.Now()
		if err = s.keepAlive(ctx, "refresh", joined.Token); err != nil {
			return err
		}
		s.screen.say(alice.name, "refreshes: another %d s", life)
	}
	s.screen.say(alice.name, "crashes: no more keep-alives")
	expired, err := s.bobAwaits(ctx, alice, joined, "expired")
	if err != nil {
		return err
	}
	if lived := time.Since(lastKeepAlive); lived < life*time.Second {
		return fmt.Errorf("the event expired %s after the last keep-alive, before its life time was over", lived)
	}
	if err = s.screen.event("the closing event, sent by the homeserver in alice's name:", expired); err != nil {
		return err
	}
	return s.expectRefused(ctx, "alice", joined.Token)
}

// end: the holder of the token can close the event at once.
func (s *story) end(ctx context.Context, carol *participant) error {
	joined, _, err := s.join(ctx, carol, 3600)
	if err != nil {
		return err
	}
	s.screen.say("SFU", "loses carol's connection, and calls /end with her token")
	if err = s.keepAlive(ctx, "end", joined.Token); err != nil {
		return err
	}
	if _, err = s.bobAwaits(ctx, carol, joined, "ended"); err != nil {
		return err
	}
	return s.expectRefused(ctx, "SFU", joined.Token)
}

// replace: a new state event stops the timer of the previous one.
func (s *story) replace(ctx context.Context, dave *participant) error {
	joined, _, err := s.join(ctx, dave, 3600)
	if err != nil {
		return err
	}
	again, _, err := s.join(ctx, dave, 3600)
	if err != nil {
		return err
	}
	if err = s.expectRefused(ctx, dave.name, joined.Token); err != nil {
		return err
	}
	if err = s.keepAlive(ctx, "refresh", again.Token); err != nil {
		return err
	}
	s.screen.say(dave.name, "refreshes with the new token: 200")
	return nil
}

// join sends a participant's membership of the call as an expiring event, and returns the event as bob sees it.
func (s *story) join(ctx context.Context, p *participant, seconds int) (*sent, *event.Event, error) {
	var joined sent
	path := p.client.BuildClientURL("v3", "rooms", s.room, "state", member.Type, p.client.UserID)
	content := map[string]any{"m.will_expire": seconds, "call": time.Now().Format(time.TimeOnly + ".000")}
	if _, err := p.client.MakeRequest(ctx, http.MethodPut, path, content, &joined); err != nil {
		return nil, nil, err
	}
	if joined.Token == "" || joined.EventID == "" {
		return nil, nil, errors.New("the answer to the send has no token or no event ID")
	}
	s.screen.say(p.name, "is in the call, \"m.will_expire\": %d, and gets a token", seconds)
	running, err := s.bobAwaits(ctx, p, &joined, "running")
	return &joined, running, err
}

// keepAlive calls the keep-alive endpoint, without an access token.
func (s *story) keepAlive(ctx context.Context, method, token string) error {
	anybody, err := mautrix.NewClient(s.server, "", "")
	if err != nil {
		return err
	}
	body := map[string]string{"expire_refresh_token": token}
	if _, err = anybody.MakeRequest(ctx, http.MethodPut, anybody.BuildClientURL("v3", "expiration", method), body, nil); err != nil {
		return fmt.Errorf("/expiration/%s: %w", method, err)
	}
	return nil
}

func (s *story) expectRefused(ctx context.Context, who, token string) error {
	err := s.keepAlive(ctx, "refresh", token)
	if !errors.Is(err, mautrix.MNotFound) {
		return fmt.Errorf("a token that is no longer valid was answered with: %v", err)
	}
	s.screen.say(who, "refreshes with the old token: 404 M_NOT_FOUND")
	return nil
}

// bobAwaits waits until bob sees the event that a participant sent, or its closing event.
func (s *story) bobAwaits(ctx context.Context, p *participant, joined *sent, want string) (e *event.Event, err error) {
	err = s.screen.during(fmt.Sprintf("waiting until bob sees %s: %s", p.name, want), func() error {
		select {
		case e = <-s.bobSees:
		case <-time.After(patience):
			return fmt.Errorf("bob does not see %s: %s", p.name, want)
		case <-ctx.Done():
			return ctx.Err()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.screen.say("bob", "sees %s: %s", p.name, e.Content.Raw["m.will_expire"])
	return e, check(e, p, joined, want)
}

// check compares an event with what docs/protocol.md promises.
func check(e *event.Event, p *participant, joined *sent, want string) error {
	relation, _ := e.Content.Raw["m.relates_to"].(map[string]any)
	switch {
	case e.Content.Raw["m.will_expire"] != want:
		return fmt.Errorf("m.will_expire is %v, not %q", e.Content.Raw["m.will_expire"], want)
	case e.Sender != p.client.UserID, e.GetStateKey() != string(p.client.UserID), e.Type.Type != member.Type:
		return fmt.Errorf("sender, type or state key is wrong: %s, %s, %s", e.Sender, e.Type.Type, e.GetStateKey())
	case want == "running" && e.ID != joined.EventID:
		return fmt.Errorf("the event is %s, not %s", e.ID, joined.EventID)
	case want != "running" && (relation["event_id"] != string(joined.EventID) || relation["rel_type"] != "m.expire.relationship"):
		return fmt.Errorf("the relation of the closing event is %v", relation)
	}
	return nil
}

// expectSilence waits, and fails if bob sees an event meanwhile.
func (s *story) expectSilence(ctx context.Context, d time.Duration) error {
	return s.screen.during("alice is in the call", func() error {
		select {
		case e := <-s.bobSees:
			return fmt.Errorf("bob sees %v while the event is being kept alive", e.Content.Raw["m.will_expire"])
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

func (s *story) register(ctx context.Context, name string) (*participant, error) {
	client, err := mautrix.NewClient(s.server, "", "")
	if err != nil {
		return nil, err
	}
	const password = "only-for-the-demo"
	var account *mautrix.RespRegister
	if s.secret == "" {
		account, err = client.RegisterDummy(ctx, &mautrix.ReqRegister[any]{Username: name + s.suffix, Password: password})
		if err != nil {
			err = fmt.Errorf("%w (does the server need --registration-secret?)", err)
		}
	} else {
		admin := &synapseadmin.Client{Client: client}
		account, err = admin.SharedSecretRegister(ctx, s.secret, synapseadmin.ReqSharedSecretRegister{
			Username: name + s.suffix, Password: password,
		})
	}
	if err != nil {
		return nil, err
	}
	client.UserID, client.AccessToken = account.UserID, account.AccessToken
	return &participant{name: name, client: client}, nil
}

// meet makes a room in which everybody may be in a call.
func (s *story) meet(ctx context.Context, host *participant, guests ...*participant) error {
	room, err := host.client.CreateRoom(ctx, &mautrix.ReqCreateRoom{
		Preset:             "public_chat",
		PowerLevelOverride: &event.PowerLevelsEventContent{Events: map[string]int{member.Type: 0}},
	})
	if err != nil {
		return fmt.Errorf("creating a room: %w", err)
	}
	s.room = room.RoomID
	for _, guest := range guests {
		if _, err = guest.client.JoinRoomByID(ctx, s.room); err != nil {
			return fmt.Errorf("%s joining the room: %w", guest.name, err)
		}
	}
	return nil
}

// follow collects what bob sees of the call by /sync, until ctx is done.
func (s *story) follow(ctx context.Context, bob *participant) error {
	first, err := bob.client.SyncRequest(ctx, 0, "", "", false, event.PresenceOnline)
	if err != nil {
		return fmt.Errorf("bob's first sync: %w", err)
	}
	if err = bob.client.Store.SaveNextBatch(ctx, bob.client.UserID, first.NextBatch); err != nil {
		return err
	}
	bob.client.Syncer.(*mautrix.DefaultSyncer).OnEvent(func(_ context.Context, e *event.Event) {
		if e.Type.Type == member.Type && e.RoomID == s.room {
			select {
			case s.bobSees <- e:
			default: // far more events than the story has
			}
		}
	})
	go func() {
		if err := bob.client.SyncWithContext(ctx); err != nil && ctx.Err() == nil {
			s.screen.say("bob", "cannot follow any more: %s", err)
		}
	}()
	return nil
}
