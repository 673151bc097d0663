// Package jsondepth limits how deeply JSON may be nested. Content that one decoder accepts can break the next: Go's decoders give up at
// 10,000 levels, and Python's near 1,000. Dendrite adds further levels around the content when it stores or sends an event.
package jsondepth

// Max is how many levels of arrays and objects the content of an event, or a client's request, may have.
const Max = 200

// TooDeep reports whether JSON is nested deeper than Max. For text that is not JSON, the result means nothing.
func TooDeep(data []byte) bool {
	var c Counter
	return c.TooDeep(data)
}

// Counter follows the nesting of JSON that arrives in pieces. Its zero value is ready to use.
type Counter struct {
	depth int
	// inString is set inside a string, and escaped after a backslash in a string.
	inString, escaped bool
}

// TooDeep reads the next piece, and reports whether the JSON is nested deeper than Max in it. Once it has returned true, the counter must
// not be used again.
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

// stringEnd has the bytes at which the scan of a string stops.
var stringEnd = [256]bool{'"': true, '\\': true}
