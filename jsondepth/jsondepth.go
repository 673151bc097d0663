// Package jsondepth bounds how deeply JSON may be nested. Content that one decoder accepts can break the next: decoders of
// Go give up at 10,000 levels, those of Python near 1,000, and what Dendrite stores or sends wraps content in further levels.
package jsondepth

// Max is how many arrays and objects may stand inside one another, in the content of an event and in a request of a client.
const Max = 200

// TooDeep reports whether JSON is nested deeper than Max. Of text that is not JSON it says nothing useful.
func TooDeep(data []byte) bool {
	var c Counter
	return c.TooDeep(data)
}

// Counter follows the nesting of JSON that arrives in pieces. Its zero value is ready to use.
type Counter struct {
	depth int
	// inString is set between two quotation marks, and escaped behind a backslash there.
	inString, escaped bool
}

// TooDeep looks at the next piece and reports whether the JSON is nested deeper than Max within it. After that the counter
// must not be used again.
func (c *Counter) TooDeep(piece []byte) bool {
	depth, inString, escaped := c.depth, c.inString, c.escaped
	for i := 0; i < len(piece); i++ {
		if inString {
			if escaped {
				escaped = false
				continue
			}
			for i < len(piece) && !stringEnd[piece[i]] {
				i++
			}
			if i == len(piece) {
				break
			}
			inString, escaped = piece[i] != '"', piece[i] == '\\'
			continue
		}
		switch piece[i] {
		case '"':
			inString = true
		case '{', '[':
			if depth++; depth > Max {
				return true
			}
		case '}', ']':
			depth--
		}
	}
	c.depth, c.inString, c.escaped = depth, inString, escaped
	return false
}

// stringEnd has the bytes that mean something within a string.
var stringEnd = [256]bool{'"': true, '\\': true}
